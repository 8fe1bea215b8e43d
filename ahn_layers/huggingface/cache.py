"""The cache that ``generate`` returns, and how our layers get into the caches of transformers.

A retrofitted model builds its caches as any other; our layers replace the empty ones.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    QuantizedCache,
)

from ..files import as_device, load_tensors, reading, save_tensors
from .all_layers import all_or_none, refuse_masks, refuse_reset
from .cache_check import check_loaded
from .cache_layers import LayerCache, MemoryLayer
from .finished import forget_beams, note_beams_of
from .fixed import is_fixed, is_traced, release
from .hybrid_layer import layer_in_place_of, static_length
from .layer_values import describe, rebuild, tensors_of
from .linear_rows import forget_states
from .native_layer import SHARING, forget_past, refuse_gaps
from .rows import join_layers, numbers, put_layers, rows_of, take_layers
from .transaction import length_before, settle, settle_for_use


class HippocampalCache(DynamicCache):
    """The cache of a retrofitted model, as ``generate`` makes it: a transformers cache that can be forked and saved.

    Make one yourself to keep it over several calls: ``generate(..., cache=HippocampalCache())``. It needs no arguments.
    Before transformers 5.24 a model that is not retrofitted calls that of ``generate`` ``past_key_values``.

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
        """Take back the last tokens, see ``MemoryLayer.crop``; if a layer refuses, all stay as they are."""
        forget_beams(self)._settle_for_change()
        with all_or_none(self.layers):
            super().crop(int(tokens_to_remove))
            refuse_gaps(self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, in place."""
        self._settle_for_change()
        with all_or_none(self.layers):
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._settle_for_change()
        with all_or_none(self.layers):
            super().reorder_cache(self._numbers().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._settle_for_change()
        with all_or_none(self.layers):
            super().reorder_cache(self._numbers()[indices])

    def reset(self) -> None:
        """Forget everything."""
        release(forget_beams(self))
        forget_states(refuse_reset(self.layers))
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without a call that was interrupted."""
        settle(self)
        return dict(vars(self))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns that have been read; those of a call that is running, or was interrupted, do not count."""
        before = length_before(self, layer_idx)
        length = super().get_seq_length(layer_idx) if before is None else before
        return int(length) if is_fixed(self) and not is_traced() else length

    @property
    def joined(self) -> bool:
        """Whether its rows have different lengths, since they were joined."""
        paddings = (layer.padding for layer in self.layers if isinstance(layer, MemoryLayer))
        return any(padding is not None and bool(padding.before) for padding in paddings)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(u.numel() * u.element_size() for layer in self.layers for u in tensors_of(layer).values())

    def clone(self, device: torch.device | str | None = None) -> "HippocampalCache":
        """A copy that shares nothing: continue one prefix in several ways.

        There is no ``to``, as no cache of transformers has one: what moves the arguments of a layer to its device, as
        accelerate does, would call it, and each layer would fill a copy of its own.

        Args:
            device: where the copy is; by default each layer stays where it is. A dtype is a TypeError.
        """
        return self._rebuilt(lambda held: {n: u.detach().to(as_device(device), copy=True) for n, u in held.items()})

    def reorder(self, index: Tensor | Sequence[int]) -> "HippocampalCache":
        """A copy with the rows at ``index``, in that order."""
        copy = self.clone()
        copy.reorder_cache(torch.as_tensor(index))
        return copy

    @classmethod
    def join(cls, caches: Sequence["HippocampalCache"], *, rows: int | None = None) -> "HippocampalCache":
        """One cache with the rows of all, in that order: conversations that go on as a batch.

        A row is of fixed size however long its text is, so texts of any lengths fit together. The joined cache is as
        long as its longest row. A padding mask for it has a column for each of these and the new tokens, with zeros at
        the left of shorter rows, as for a batch that is padded on the left; without a mask the new tokens are real.
        Without ``position_ids``, every row goes on at the position at which it would go on alone.

        Args:
            caches: caches of one model; they stay as they are.
            rows: allocate so many rows and every slot, at addresses that never change: what a decoding step is recorded
                on. Rows beyond those given are copies of the last one, to be replaced with ``put``. By default there
                are as many rows as given, and slots grow with the text.

        Raises:
            ValueError: if the caches do not fit together: other layers, windows, dtypes, devices, memory weights.

        Examples:
            >>> HippocampalCache.join([])
            Traceback (most recent call last):
            ValueError: no caches to join: expected at least one.
        """
        if not caches:
            raise ValueError("no caches to join: expected at least one.")
        for cache in caches:
            settle(cache)
        joined = cls()
        joined.layers = join_layers([cache.layers for cache in caches], rows)
        forget_past(joined.layers)
        return joined

    def take(self, rows: int | Iterable[int] | Tensor) -> "HippocampalCache":
        """A copy of some rows, in that order, as if they had always been by themselves.

        Args:
            rows: their numbers.

        Raises:
            IndexError: if there is no such row.
            TypeError: if ``rows`` is a mask.
        """
        settle(self)
        copy = type(self)()
        copy.layers = take_layers(self.layers, numbers(_listed(rows), len(rows_of(self.layers))))
        forget_past(copy.layers)
        return copy

    def put(self, rows: int | Iterable[int] | Tensor, cache: "HippocampalCache") -> None:
        """Replace rows by those of another cache, in place. The other rows go on as if nothing had happened.

        Args:
            rows: numbers of the rows to replace, all different.
            cache: a cache of the same model with as many rows; it stays as it is.

        Raises:
            IndexError: if there is no such row.
            TypeError: if ``rows`` is a mask.
            ValueError: if the rows do not fit. Nothing has changed.
        """
        settle(self)
        release(self)
        settle(cache)
        cache = self.take(range(len(rows_of(self.layers)))) if cache is self else cache
        put_layers(self.layers, numbers(_listed(rows), len(rows_of(self.layers))), cache.layers)
        forget_past(self.layers)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically; resume with ``load`` in any process."""
        settle_for_use(self)
        description = {"layers": [describe(layer) for layer in self.layers]}
        tensors = {f"{i}.{name}": u for i, layer in enumerate(self.layers) for name, u in tensors_of(layer).items()}
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
                cache.layers.append(rebuild(layer, own))
                check_loaded(cache.layers[-1], layer)
        return cache

    def _numbers(self) -> Tensor:
        """The number of each row; rows are chosen by ``reorder_cache``, which layers of all kinds know."""
        held = next((u for layer in self.layers for u in tensors_of(layer).values()), torch.empty(0))
        return torch.arange(len(held), device=held.device)

    def _settle_for_change(self) -> None:
        settle_for_use(self)
        release(self)

    def _rebuilt(self, function: Any) -> "HippocampalCache":
        settle_for_use(self)
        copy = note_beams_of(self, type(self)())
        copy.layers = [rebuild(describe(layer), function(tensors_of(layer))) for layer in self.layers]
        return copy


def _listed(rows: int | Iterable[int] | Tensor) -> int | list[int] | Tensor:
    """Numbers of rows, of which none is part of a mask; those that can be read once are read here."""
    rows = rows if isinstance(rows, (int, Tensor)) else list(rows)
    refuse_masks(rows)
    return rows


def fill(cache: HippocampalCache, config: Any) -> None:
    """Give an empty cache the layers that a model with this config expects, of whatever kinds they are."""
    if not cache.layers:
        made = DynamicCache(config=config)
        if cache._recording:
            made.activate_past_recording()
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
    made = cache.layer_class_to_replicate
    if made is None and not SHARING:
        made = DynamicLayer  # transformers 5.17 makes no cache layer for a layer that shares keys
    if made is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(made())
    layer = cache.layers[layer_idx]
    if isinstance(layer, MemoryLayer):
        return layer
    shares = isinstance(layer, SHARING)  # keys and values come from another layer, which holds tokens or not
    shares |= type(layer) is DynamicLayer and static_length(cache.layers) is not None  # and was made above
    if not shares and layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"layer {layer_idx} of this cache holds {int(layer.get_seq_length())} tokens of full attention: they "
            "cannot be taken over by the bounded memory. Begin with an empty cache."
        )
    ours = layer_in_place_of(layer, static_length(cache.layers if shares else [layer]))
    ours.record_past = bool(getattr(layer, "record_past", False) or getattr(cache, "_recording", False))
    cache.layers[layer_idx] = ours
    return ours
