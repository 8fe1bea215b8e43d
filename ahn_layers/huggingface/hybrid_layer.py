"""Cache layers of blocks that attend beside a convolution or a recurrence: a memory state and that one's states."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer, StaticLayer

from .cache_layers import MemoryLayer
from .linear_rows import of_fixed_size
from .static_layer import StaticMemoryLayer


class _WithLinear:
    """Before a ``MemoryLayer`` in the order of classes: a layer of transformers for the convolution or recurrence.

    Attributes:
        linear: that layer.
    """

    linear: LinearAttentionLayer

    number_of_states = property(lambda self: self.linear.number_of_states)
    conv_states = property(lambda self: self.linear.conv_states)
    recurrent_states = property(lambda self: self.linear.recurrent_states)
    is_conv_states_initialized = property(lambda self: self.linear.is_conv_states_initialized)
    is_recurrent_states_initialized = property(lambda self: self.linear.is_recurrent_states_initialized)
    has_previous_state = property(lambda self: self.linear.has_previous_state)
    conv_kernel_size = property(lambda self: self.linear.conv_kernel_size)
    device = property(lambda self: self.linear.device)
    dtype = property(lambda self: self.linear.dtype)
    is_croppable = False  # a recurrence cannot be taken back

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first tokens say what is needed."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """As transformers' own layer."""
        return self.linear.update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """As transformers' own layer."""
        return self.linear.update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def activate_past_recording(self) -> None:
        """From now on ``crop`` may be asked for, which this layer refuses."""

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrence is not cropped.

        Raises:
            RuntimeError: always, unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise RuntimeError(
                f"crop({tokens_to_remove}): this layer holds a recurrence beside its attention, which cannot be taken "
                "back. Clone the cache before the tokens to be taken back, and go back to the clone."
            )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.linear.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.linear.reorder_cache(beam_idx)


class HybridMemoryLayer(_WithLinear, MemoryLayer, LinearAttentionCacheLayerMixin):
    """A memory layer and a convolution or recurrence."""

    is_compileable = False

    def __init__(self, linear: LinearAttentionLayer) -> None:
        MemoryLayer.__init__(self)
        self.linear = linear


class StaticHybridMemoryLayer(_WithLinear, StaticMemoryLayer, LinearAttentionCacheLayerMixin):
    """The same with every slot allocated, see ``StaticMemoryLayer``."""

    is_compileable = True

    def __init__(self, max_cache_len: int, linear: LinearAttentionLayer | None = None) -> None:
        StaticMemoryLayer.__init__(self, max_cache_len)
        self.linear = LinearAttentionLayer() if linear is None else linear


def layer_in_place_of(native: Any, max_cache_len: int | None) -> MemoryLayer:
    """Our layer, a static one if it has a length, for one of transformers that holds no keys.

    A recurrence may have run before the attention.
    """
    if isinstance(native, LinearAttentionCacheLayerMixin):
        linear = LinearAttentionLayer(number_of_states=native.number_of_states)
        vars(linear).update({name: getattr(native, name) for name in vars(linear)})
        for i in range(linear.number_of_states) if linear.record_past else ():
            linear.conv_states[i] = of_fixed_size(linear, "conv_states", i)
        linear.record_past = False  # nothing is ever taken back from it
        return HybridMemoryLayer(linear) if max_cache_len is None else StaticHybridMemoryLayer(max_cache_len, linear)
    return MemoryLayer() if max_cache_len is None else StaticMemoryLayer(max_cache_len)


def static_length(layers: list[Any]) -> int | None:
    """The length of the static layers among these, None if there is none."""
    return next((layer.max_cache_len for layer in layers if isinstance(layer, (StaticLayer, StaticMemoryLayer))), None)
