"""The cache that ``generate`` returns, and how our layers get into the caches of transformers.

A retrofitted model builds its caches as any other; our layers replace the empty ones.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    QuantizedCache,
)

from ..files import load_tensors, reading, save_tensors
from ..state import MemoryState
from .cache_layers import LayerCache, MemoryLayer
from .hybrid_layer import layer_in_place_of, static_length
from .padding import Padding
from .transaction import settle


class HippocampalCache(DynamicCache):
    """The cache of a retrofitted model, as ``generate`` makes it: a transformers cache that can be forked and saved.

    Make one yourself to keep it over several calls: ``generate(..., cache=HippocampalCache())``. Before transformers
    5.24 a model that is not retrofitted calls this argument ``past_key_values``.

    Examples:
        >>> cache = HippocampalCache()
        >>> len(cache)
        0
    """

    @classmethod
    def of(cls, cache: Cache) -> "HippocampalCache":
        """The same layers as another cache of a retrofitted model, which must not be used any further."""
        ours = cls()
        ours.layers, ours.layer_class_to_replicate = cache.layers, cache.layer_class_to_replicate
        return ours

    _recording = False

    def activate_past_recording(self) -> None:
        """From now on keep what ``crop`` needs to take tokens back, in layers to come as well."""
        self._recording = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last tokens, see ``MemoryLayer.crop``."""
        settle(self)
        super().crop(int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, in place."""
        settle(self)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        settle(self)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        settle(self)
        super().batch_select_indices(indices)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without a call that was interrupted."""
        settle(self)
        return dict(vars(self))

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(u.numel() * u.element_size() for layer in self.layers for u in _tensors(layer).values())

    def clone(self, device: torch.device | str | None = None) -> "HippocampalCache":
        """A copy that shares nothing: continue one prefix in several ways.

        There is no ``to``, as no cache of transformers has one: what moves the arguments of a layer to its device, as
        accelerate does, would call it, and each layer would fill a copy of its own.

        Args:
            device: where the copy is; by default each layer stays where it is.
        """
        return self._rebuilt(lambda tensors: {name: u.detach().to(device, copy=True) for name, u in tensors.items()})

    def reorder(self, index: Tensor) -> "HippocampalCache":
        """A copy with the rows at ``index``, in that order."""
        copy = self.clone()
        copy.reorder_cache(index)
        return copy

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically; resume with ``load`` in any process."""
        settle(self)
        description = {"layers": [_describe(layer) for layer in self.layers]}
        tensors = {f"{i}.{name}": u for i, layer in enumerate(self.layers) for name, u in _tensors(layer).items()}
        save_tensors(path, tensors, "cache", description)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "HippocampalCache":
        """Read a cache back, bit for bit.

        Raises:
            ValueError: if the file is not a cache, is damaged, or has an unknown format version.
        """
        tensors, description = load_tensors(path, "cache", device)
        cache = cls()
        with reading(path):
            for i, layer in enumerate(description["layers"]):
                own = {name.split(".", 1)[1]: u for name, u in tensors.items() if name.split(".", 1)[0] == str(i)}
                cache.layers.append(_rebuild(layer, own))
        return cache

    def _rebuilt(self, function: Any) -> "HippocampalCache":
        settle(self)
        copy = type(self)()
        copy.layers = [_rebuild(_describe(layer), function(_tensors(layer))) for layer in self.layers]
        return copy


def _tensors(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, MemoryLayer):
        return {} if layer.state is None else layer.state.tensors()
    held = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, ())
        held |= {f"{name}.{i}": states[i] for i in range(len(states))}
    return {name: u for name, u in held.items() if isinstance(u, Tensor)}


def _describe(layer: Any) -> dict[str, Any]:
    """What the tensors alone do not say, as JSON values."""
    if isinstance(layer, MemoryLayer):
        if layer.state is None:
            return {"type": "memory"}
        state = layer.state.description()
        if state["length"] is None:  # a static layer is resumed as a dynamic one
            length = int(layer.get_seq_length())
            state |= {"length": length, "padded": not bool((layer.state.seen == length).all())}
        turns = None if layer.padding is None else layer.padding.turns
        return {"type": "memory", "state": state, "padding": turns, "made_with": layer.made_with}
    if type(layer) is DynamicSlidingWindowLayer:
        return {"type": "sliding", "sliding_window": layer.sliding_window, "seen": layer.cumulative_length}
    if type(layer) is DynamicLayer:
        return {"type": "full"}
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be copied or saved here: use copy.deepcopy.")


def _rebuild(description: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Inverse of ``_describe`` and ``_tensors``."""
    if description["type"] == "memory":
        layer: Any = MemoryLayer()
        if "state" in description:
            layer.state = MemoryState.from_tensors(tensors, description["state"])
            layer.made_with, turns = description.get("made_with", ""), description.get("padding")
            layer.padding = None if turns is None else Padding(tuple(tuple(row) for row in turns))
        return layer
    sliding = description["type"] == "sliding"
    layer = DynamicSlidingWindowLayer(description["sliding_window"]) if sliding else DynamicLayer()
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
    if sliding:
        layer.cumulative_length = description["seen"]
    return layer


def fill(cache: HippocampalCache, config: Any) -> None:
    """Give an empty cache the layers that a model with this config expects, of whatever kinds they are."""
    if not cache.layers:
        made = DynamicCache(config=config)
        cache.layers, cache.layer_class_to_replicate = made.layers, made.layer_class_to_replicate


def self_attention(cache: Any) -> Any:
    """The cache of a decoder's own tokens, also where it stands beside one of an encoder's."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def memory_layer(cache: Any, layer_idx: int) -> MemoryLayer | None:
    """Our layer at this index of a cache, put there in place of an empty one if need be.

    Raises:
        ValueError: if the layer holds tokens of full attention, or the cache is of a kind that we cannot stand in for.
    """
    if cache is None:
        return None
    if isinstance(cache, LayerCache):
        return cache.layer
    if not isinstance(cache, Cache) or isinstance(cache, (EncoderDecoderCache, QuantizedCache)) or cache.offloading:
        kind = "that is offloaded" if getattr(cache, "offloading", False) else f"of type {type(cache).__name__}"
        raise ValueError(
            f"a retrofitted model cannot use a cache {kind}: its window is small and its state fixed, so nothing is "
            "gained. Leave cache_implementation unset, or use 'static'."
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, MemoryLayer):
        return layer
    shares = isinstance(layer, DummyLayer)  # keys and values come from another layer, which holds tokens or not
    if not shares and layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"layer {layer_idx} of this cache holds {int(layer.get_seq_length())} tokens of full attention: they "
            "cannot be taken over by the bounded memory. Begin with an empty cache."
        )
    ours = layer_in_place_of(layer, static_length(cache.layers if shares else [layer]))
    ours.record_past = bool(getattr(layer, "record_past", False) or getattr(cache, "_recording", False))
    cache.layers[layer_idx] = ours
    return ours
