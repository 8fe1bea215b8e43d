"""The attention block of a transformers decoder, its attention replaced by a memory store."""

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..attention import Attend, HippocampalAttention
from ..memory import MemoryStore
from .cache import memory_layer
from .cache_layers import MemoryLayer, StaticMemoryLayer
from .interface import implementation_name
from .probe import AttentionBlock

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What models and ``generate`` call the cache: ``cache`` since transformers 5.24."""
CACHE_NAMES = (CACHE, "past_key_values", "past_key_value", "layer_past")
"""What the cache is called in the forward of attention blocks."""


class DecoderAttention(HippocampalAttention):
    """[`HippocampalAttention`][ahn_layers.HippocampalAttention] for a block of transformers, its state in the cache.

    Called, and answering, exactly as the block was.

    Args:
        found: the attention block, as the probe described it.
        store: the memory.
        base: the attention implementation that the model had.
        owned: whose masks are ours, see ``ahn_layers.huggingface.interface``.
    """

    def __init__(self, found: AttentionBlock, store: MemoryStore, *, base: str, owned: str) -> None:
        super().__init__(found.module, store)
        self.found = found
        self.layer_idx = found.layer_idx
        self.base = base
        self.owned = owned
        self.mode = "memory"
        names = list(inspect.signature(type(found.module).forward).parameters)[1:]
        self._hidden_at = names.index("hidden_states") if "hidden_states" in names else 0
        self._hidden_name = names[self._hidden_at]
        self._cache_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])
        self._cache_at = names.index(self._cache_name) if self._cache_name in names else len(names)
        kept_far = store.window.num_sinks > 0 and store.window.sink_positions != "absolute"
        self._warn_after = found.trained_length if kept_far and found.fixed_positions else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a new process the attention function has to be known again by its name."""
        super().__setstate__(state)
        implementation_name(self.base, self.owned)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The block's forward."""
        if self.mode == "full":
            return self.block(*args, **kwargs)
        x: Tensor = _argument(args, kwargs, self._hidden_at, self._hidden_name)
        name = next((name for name in CACHE_NAMES if name in kwargs), self._cache_name)  # the block knows old names too
        layer = self.cache_layer(_argument(args, kwargs, self._cache_at, name))
        attend = Attend(type(self.block).__name__, self._runner(layer, x))
        if layer is None:
            out = self.block(*args, attend=attend, **kwargs)
        else:
            layer.armed = True
            try:
                out = self.block(*args, attend=attend, **kwargs)
            finally:
                layer.armed = False
        attend.check()
        if self._warn_after is not None:
            self._warn_if_far(x.shape[1] if layer is None or layer.is_compileable else layer.get_seq_length())
        return out

    def anonymous(self) -> "DecoderAttention":
        """A shallow copy that does not know which layer it is, so that compiled code serves all layers."""
        copied, block = copy.copy(self), copy.copy(self.block)
        copied.__dict__["block"] = block  # not a child, as in __init__
        for module in (copied, block):
            if isinstance(vars(module).get("layer_idx"), int):
                module.__dict__["layer_idx"] = 0
        return copied

    @property
    def store(self) -> MemoryStore:
        """What attends now: the memory, or the window without it."""
        return self.memory if self.mode == "memory" else self.memory.without_memory()

    @property
    def owns_mask(self) -> bool:
        """Whether its mask is ours, since every layer of its kind is retrofitted."""
        return ("local" if self.found.kind == "sliding" else "full") in self.owned.split("+")

    def cache_layer(self, cache: Any) -> MemoryLayer | None:
        """Our layer in this cache, put there if need be.

        Raises:
            ValueError: if we cannot work with this cache.
        """
        layer = memory_layer(cache, self.layer_idx)
        if isinstance(layer, StaticMemoryLayer) and not self.owns_mask:
            raise ValueError(
                "a static cache was given to a model of which only some layers of a kind are retrofitted: in their "
                "common mask of fixed length, padding among the new tokens cannot be found. Use a dynamic cache, or "
                "retrofit all of them."
            )
        return layer

    def _runner(self, layer: MemoryLayer | None, x: Tensor) -> Callable[..., Tensor]:
        store = self.store

        def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            hidden = x.to(q.device)
            if layer is None:
                out: Tensor = store(q, k, v, hidden, **options)[0]
                return out
            return layer.run(store, q, k, v, hidden, **options)

        return run

    def _warn_if_far(self, length: int) -> None:
        if self._warn_after is not None and length > self._warn_after:
            warnings.warn(
                f"{type(self.block).__name__}: the text has passed the trained length of {self._warn_after} tokens, "
                f"and the sinks stay at their true distance, since {self.found.fixed_positions}. Quality may collapse; "
                "use num_sinks=0, or sink_positions='absolute' to say that this is meant.",
                stacklevel=2,
            )
            self._warn_after = None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if index < len(args) else kwargs.get(name)
