"""The attention block of a transformers decoder, and how ``generate`` gets a cache for it."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..attention import Attend, HippocampalAttention
from ..memory import MemoryStore
from .cache import HippocampalCache, MemoryLayer, memory_layer
from .interface import implementation_name
from .probe import AttentionBlock

PREFILL_CHUNK = 4096
"""Tokens that ``generate`` reads at a time, unless the caller asks for another size."""

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")
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
        layer = memory_layer(_argument(args, kwargs, self._cache_at, self._cache_name), self.layer_idx)
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

    def _runner(self, layer: MemoryLayer | None, x: Tensor) -> Callable[..., Tensor]:
        use_memory = self.mode == "memory"

        def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            hidden = x.to(q.device)
            if layer is None:
                out: Tensor = self.memory(q, k, v, hidden, use_memory=use_memory, **options)[0]
                return out
            return layer.run(self.memory, q, k, v, hidden, use_memory=use_memory, **options)

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


class PrepareCache:
    """Stands in for ``model._prepare_cache_for_generation``: the cache of ``generate`` gets our layers from the start.

    A prompt that may outgrow the window is read in chunks of ``PREFILL_CHUNK`` tokens, so that not only the cache but
    the activations too stay bounded.

    An object and not a function, so that the model can still be pickled and copied.

    Args:
        model: the retrofitted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Make the cache as the model would, then put our layers in."""
        model: Any = self.model
        prepare = type(model)._prepare_cache_for_generation
        blocks = [module for module in model.modules() if isinstance(module, DecoderAttention)]
        if all(block.mode == "full" for block in blocks):
            return prepare(model, generation_config, model_kwargs, *args, **kwargs)
        chunk = generation_config.prefill_chunk_size
        generation_config.prefill_chunk_size = None  # else a static cache of full length is allocated at once
        try:
            result = prepare(model, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.prefill_chunk_size = chunk
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return result
        for block in blocks:
            memory_layer(cache, block.layer_idx)
        if not getattr(cache, "_is_user_defined", False):
            model_kwargs["past_key_values"] = cache = HippocampalCache.of(cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        if chunk is None and not cache.is_compileable and _is_plain_text(model_kwargs):
            generation_config.prefill_chunk_size = PREFILL_CHUNK
        return result


def _is_plain_text(model_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone, which can be cut anywhere."""
    tensors = {name for name, u in model_kwargs.items() if isinstance(u, Tensor)}
    return tensors <= {"attention_mask", "position_ids"}
