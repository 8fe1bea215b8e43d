"""The attention block of a transformers decoder, its attention replaced by a memory store."""

import copy
import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..attention import Attend, HippocampalAttention
from ..memory import MemoryStore
from ..positions import Rotary
from ..record import Mode, Retrofitted
from ..split import refuse_gradients
from .cache import memory_layer, self_attention
from .cache_layers import MemoryLayer
from .call import CACHE_NAMES, padding_mask
from .config_view import base_name, configs_of
from .interface import BASES
from .packing import attend_each
from .probe import AttentionBlock
from .static_layer import StaticMemoryLayer
from .weights import Recorded, Weights, are_collected

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What models and ``generate`` call the cache: ``cache`` since transformers 5.24."""


class DecoderAttention(HippocampalAttention):
    """[`HippocampalAttention`][ahn_layers.HippocampalAttention] for a block of transformers, its state in the cache.

    Called, and answering, exactly as the block was.
    """

    def __init__(self, found: AttentionBlock, store: MemoryStore, record: Retrofitted, recorded: Recorded) -> None:
        self.__dict__["record"] = record  # first, since the views of the block's config are copied after the record
        super().__init__(found.module, store)
        self.found, self.recorded = found, recorded
        self.__dict__["layer_idx"] = found.layer_idx  # ours, whatever the block's own is
        names = list(inspect.signature(type(found.module).forward).parameters)[1:]
        self._hidden_at = names.index("hidden_states") if "hidden_states" in names else 0
        self._config_name = next(iter(configs_of(found.module)))
        self._hidden_name = names[self._hidden_at]
        self._cache_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])
        self._cache_at = names.index(self._cache_name) if self._cache_name in names else len(names)
        kept_far = store.window.num_sinks > 0 and store.window.sink_positions != "absolute"
        self._warn_after = found.trained_length if kept_far and found.fixed_positions else None
        self._unknown_rotation = kept_far and found.on_meta

    @property
    def mode(self) -> Mode:
        """What all retrofitted layers of the model do at present."""
        return self.record.mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The block's forward."""
        if are_collected():
            self.recorded.install(self.block)
        if self.mode == "full":
            return self.block(*args, **kwargs)
        x: Tensor = _argument(args, kwargs, self._hidden_at, self._hidden_name)
        name = next((name for name in CACHE_NAMES if name in kwargs), self._cache_name)  # the block knows old names too
        layer = self.cache_layer(_argument(args, kwargs, self._cache_at, name))
        self._check()
        if self._unknown_rotation and not x.is_meta:
            raise ValueError(
                f"{type(self.block).__name__} was retrofitted on the meta device, where its rotation could not be "
                "found: load the weights first, then call retrofit."
            )
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
            self.warn_if_far(x.shape[1] if layer is None or layer.is_compileable else layer.get_seq_length())
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
    def attending(self) -> MemoryStore:
        """What attends now: the memory, or the window without it."""
        return self.store if self.mode == "memory" else self.store.without_memory()

    @property
    def owns_mask(self) -> bool:
        """Whether its mask is ours, since every layer of its kind is retrofitted."""
        return ("local" if self.found.kind == "sliding" else "full") in self.record.owned.split("+")

    def cache_layer(self, cache: Any) -> MemoryLayer | None:
        """Our layer in this cache, put there if need be.

        Raises:
            ValueError: if we cannot work with this cache.
        """
        if hasattr(sys.modules[type(self.block).__module__], "EncoderDecoderCache"):
            cache = self_attention(cache)  # as the block does
        layer = memory_layer(cache, self.layer_idx)
        if isinstance(layer, StaticMemoryLayer) and not self.owns_mask and torch.compiler.is_compiling():
            raise ValueError(
                "a compiled model with a static cache, of which only some layers of a kind are retrofitted: in their "
                "common mask of fixed length, padding among the new tokens cannot be found. Do not compile it, use a "
                "dynamic cache, or retrofit all of them."
            )
        return layer

    def _runner(self, layer: MemoryLayer | None, x: Tensor) -> Callable[..., Tensor]:
        store = self.attending

        def alone(options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
            return store(q, k, v, hidden, **options)[0]

        def run(
            q: Tensor, k: Tensor, v: Tensor, *, weights: Weights | None = None, texts: Tensor | None = None,
            **options: Any,
        ) -> Tensor:  # fmt: skip
            hidden = x.to(q.device) if store.split is None else refuse_gradients(store, x.to(q.device))
            state, valid = None if layer is None else layer.state, options["valid"]
            if weights is not None:
                weights.check(store.window, state, k.shape[2], valid, texts)
            if texts is not None:
                return _attend_texts(partial(alone, options), texts, q, k, v, hidden)
            out = alone(options, q, k, v, hidden) if layer is None else layer.run(store, q, k, v, hidden, **options)
            if weights is not None:
                if layer is None or state is None:
                    weights.find(q, k, v, None, k.shape[2], valid)
                else:
                    weights.find(q, k, v, layer.state, int(layer.get_seq_length()), padding_mask())
            return out

        return run

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move to another device or dtype, and note what the block's queries are now, and how they are rotated.

        A model in another dtype has rounded frequencies: its queries are turned back by those.
        """
        super()._apply(fn, recurse)
        if self.found.like is not None:
            self.found.like = fn(self.found.like)
        own = self.found.frequencies
        if own is not None and not own.values.is_meta:  # which may come after this block
            rounded = own.values.detach().to(fn(own.values.new_empty(0)).dtype)
            for rotary in (u for u in self.memory.modules() if isinstance(u, Rotary)):
                if not rotary.inv_freq.is_meta:
                    rotary.inv_freq = rounded.to(rotary.inv_freq, copy=True)
        return self

    def _check(self) -> None:
        base = base_name(getattr(self.block, self._config_name)._attn_implementation)
        if base not in BASES:
            raise ValueError(
                f"attn_implementation={base!r} was set after the retrofit: expected one of {BASES}. Call "
                "model.set_attn_implementation('sdpa')."
            )
        own, capacity = self.found.native_window, self.store.window.capacity
        if own is not None and own < capacity:  # the window has been changed since the retrofit
            raise ValueError(
                f"layer {self.layer_idx} was given a window of {capacity} tokens, sinks included, and attends to {own} "
                f"tokens by itself: expected at most {own}. Use a smaller window."
            )

    def warn_if_far(self, length: int) -> None:
        """Warn, once, if a text of this length shows the model sinks at distances that it was not trained on."""
        if self._warn_after is not None and length > self._warn_after:
            warnings.warn(
                f"{type(self.block).__name__}: the text has passed the trained length of {self._warn_after} tokens, "
                f"and the sinks stay at their true distance, since {self.found.fixed_positions}. Quality may collapse; "
                "use num_sinks=0, or sink_positions='absolute' to say that this is meant.",
                stacklevel=2,
            )
            self._warn_after = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_texts(*args: Any) -> Tensor:
    """How many texts there are, and where, is not known to a compiler."""
    return attend_each(*args)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if index < len(args) else kwargs.get(name)
