"""Rows of caches: taken out, joined into one cache, put in the place of others.

Rows of different lengths are aligned at their ends, as a batch that is padded on the left; the memory keeps each row's
own count, so that to it a row is what it is alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..rows import check_alike, join_rows, put_rows
from ..state import MemoryState
from . import linear_rows
from .cache_layers import MemoryLayer
from .hybrid_layer import HybridMemoryLayer, StaticHybridMemoryLayer
from .linear_rows import linear_of
from .native_layer import SHARING
from .padding import Padding, Row
from .static_layer import StaticMemoryLayer

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that are not retrofitted: keys and values of the text, or of its last tokens."""
_FIXED = {StaticMemoryLayer: MemoryLayer, StaticHybridMemoryLayer: HybridMemoryLayer}
"""Layers of fixed addresses, and what their rows are in a cache that grows."""


def rows_of(layers: Sequence[Any]) -> list[Row]:
    """Every row of a cache by itself.

    Raises:
        ValueError: if no memory layer holds any token, or the model keeps a recurrence outside of its cache.
    """
    for layer in layers:
        if isinstance(layer, MemoryLayer) and layer.state is not None:
            layer.refuse_broken()
            if missing := linear_rows.kept_elsewhere(layers):
                raise ValueError(
                    f"layers {missing} of the cache hold nothing, although it has read tokens: this model keeps their "
                    "states in its modules, so rows cannot be taken out, put in or joined. Expected states of every "
                    "row in the cache; read one batch at a time, from its first token to its last."
                )
            padding = layer.padding or Padding.none(layer.state.batch_size)
            return padding.rows(int(layer.get_seq_length()))
    raise ValueError("this cache holds no tokens of a retrofitted model: expected one that has read a text.")


def numbers(rows: int | Iterable[int] | Tensor, size: int) -> list[int]:
    """Numbers of rows as a list of whole numbers from 0.

    Raises:
        IndexError: if there is no such row.
        ValueError: if there are none.
    """
    found = [int(row) for row in ([rows] if isinstance(rows, int) else rows)]
    wrong = [row for row in found if not 0 <= row < size]
    if wrong:
        raise IndexError(f"rows {wrong}: the cache has {size} rows, expected numbers from 0 to {size - 1}.")
    if not found:
        raise ValueError("rows is empty: expected the number of at least one row.")
    return found


def take_layers(layers: Sequence[Any], index: list[int]) -> list[Any]:
    """Layers with these rows, copied, in that order, of no more columns than they need."""
    every = rows_of(layers)
    return [_layer([(layer, row, every[row]) for row in index]) for layer in layers]


def join_layers(caches: Sequence[list[Any]], count: int | None = None, *, consume: bool = False) -> list[Any]:
    """Layers with the rows of all caches.

    Args:
        caches: the layers of each.
        count: rows of fixed addresses, further ones like the last; None for as many as there are, in tensors that grow.
        consume: whether the layers of ``caches`` are given up one by one, so that no more than one of them is in memory
            twice.

    Raises:
        ValueError: if the caches do not fit together, or have more rows than ``count``.
    """
    every = [rows_of(layers) for layers in caches]
    for layers in caches[1:]:
        _check(caches[0], layers)
    places = [(c, row) for c, rows in enumerate(every) for row in range(len(rows))]
    if count is not None:
        if len(places) > count:
            raise ValueError(f"rows={count}: the caches have {len(places)} rows together, expected no more than that.")
        others = [i for i, layer in enumerate(caches[0]) if _kind(layer) in _GROWING]
        if others:
            raise ValueError(
                f"rows={count}: layers {others} are not retrofitted, and what they hold grows with the text. Leave "
                "rows out, or retrofit all layers."
            )
        places += places[-1:] * (count - len(places))
    made = []
    for i in range(len(caches[0])):
        layer = _layer([(caches[c][i], row, every[c][row]) for c, row in places])
        made.append(_fixed(layer) if count is not None and isinstance(layer, MemoryLayer) else layer)
        for layers in caches if consume else ():
            layers[i] = None
    return made


def put_layers(layers: Sequence[Any], index: list[int], others: Sequence[Any]) -> None:
    """Replace rows of a cache, in place, by those of another one.

    Raises:
        ValueError: if the rows do not fit. Nothing has changed.
    """
    mine, theirs = rows_of(layers), rows_of(others)
    if len(index) != len(theirs) or len(set(index)) != len(index):
        raise ValueError(f"rows={index}: expected {len(theirs)} different rows, one for each row of the other cache.")
    _check(layers, others)
    sources = {row: (others, i) for i, row in enumerate(index)}
    every = [theirs[sources[row][1]] if row in sources else mine[row] for row in range(len(mine))]
    length, padding = max(row.length for row in every), Padding.aligned(every)
    with _broken_if_interrupted(layers):
        for i, (layer, other) in enumerate(zip(layers, others, strict=True)):
            mine_beside, its_beside = linear_of(layer), linear_of(other)
            if mine_beside is not None and its_beside is not None:
                linear_rows.put(mine_beside, index, its_beside)
            if _kind(layer) in _GROWING:
                chosen = [sources.get(row, (layers, row)) for row in range(len(mine))]
                parts = [(whose[i], row, every[k]) for k, (whose, row) in enumerate(chosen)]
                _write(layer, parts, length)
            elif isinstance(layer, MemoryLayer) and other.state is not None:
                state = layer.changeable()
                assert state is not None
                put_rows(state, torch.tensor(index), _trimmed(other, max(row.length for row in theirs)))
                layer.edited(state, None)
                layer.align(length, padding)


def _layer(own: list[tuple[Any, int, Row]]) -> Any:
    """A new layer from rows of others."""
    rows, first = [row for _, _, row in own], own[0][0]
    kind, length = _kind(first), max(row.length for row in rows)
    linears = [(linear, row) for part, row, _ in own if (linear := linear_of(part)) is not None]
    linear = linear_rows.joined(linears) if linears else None
    if kind in (MemoryLayer, HybridMemoryLayer):
        layer = MemoryLayer() if linear is None else HybridMemoryLayer(linear)
        if first.state is not None:
            layer.made_with = next((part.made_with for part, _, _ in own if part.made_with), "")
            layer.state = _joined(own, length)
            layer.align(length, Padding.aligned(rows))
        return layer
    if kind not in _GROWING:
        return type(first)() if linear is None else linear
    other = DynamicLayer() if kind is DynamicLayer else DynamicSlidingWindowLayer(first.sliding_window)
    _write(other, own, length)
    return other


def _fixed(layer: MemoryLayer) -> StaticMemoryLayer:
    """A layer of fixed addresses with the rows of one that grows, which is given up."""
    assert layer.state is not None
    if not isinstance(layer, HybridMemoryLayer):
        return StaticMemoryLayer.of(layer.state, layer.padding, layer.made_with)
    fixed = StaticHybridMemoryLayer.of(layer.state, layer.padding, layer.made_with)
    fixed.linear = layer.linear
    return fixed


@torch.no_grad()
def _joined(parts: list[tuple[Any, int, Row]], length: int) -> MemoryState:
    """One state from rows of layers, which are read in runs of the same layer."""
    states: list[MemoryState] = []
    run: list[int] = []
    for i, (layer, row, _) in enumerate(parts):
        run.append(row)
        if i + 1 == len(parts) or parts[i + 1][0] is not layer:
            states.append(_trimmed(layer, length).reorder(torch.tensor(run)))
            run = []
    return states[0] if len(states) == 1 else join_rows(states)


def _trimmed(layer: MemoryLayer, length: int) -> MemoryState:
    """The state of a layer without slots that nothing of this length fills."""
    assert layer.state is not None
    state = layer.state
    return replace(state, slots=state.slots.columns(0, min(length, state.window.capacity)))


@torch.no_grad()
def _write(layer: Any, parts: list[tuple[Any, int, Row]], length: int) -> None:
    """Fill a layer of keys and values with rows of others, aligned at their ends."""
    made = {}
    for name in ("keys", "values") if all(part.is_initialized for part, _, _ in parts) else ():
        tensors = [getattr(part, name)[row] for part, row, _ in parts]
        tensors = [u[:, max(0, u.shape[1] - own.length) :] for u, (_, _, own) in zip(tensors, parts, strict=True)]
        most = max(u.shape[1] for u in tensors)
        made[name] = torch.stack([F.pad(u, (0, 0, most - u.shape[1], 0)) for u in tensors])
    if made:
        layer.lazy_initialization(made["keys"], made["values"])
        layer.keys, layer.values = made["keys"], made["values"]
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length = length


def _check(layers: Sequence[Any], others: Sequence[Any]) -> None:
    """Whether rows of two caches may stand in one."""
    if len(layers) != len(others):
        raise ValueError(f"caches of {len(layers)} and of {len(others)} layers: expected caches of the same model.")
    pairs = list(zip(layers, others, strict=True))
    for i, (mine, its) in enumerate(pairs):
        if _kind(mine) is not _kind(its) or _holds_keys(mine) != _holds_keys(its):
            raise ValueError(
                f"layer {i} is a {type(mine).__name__} in one cache and a {type(its).__name__} in the other, or holds "
                "tokens in one of them alone: expected caches of the same model."
            )
    for i, (mine, its) in enumerate(pairs):
        mine_beside, its_beside = linear_of(mine), linear_of(its)
        if mine_beside is not None and its_beside is not None:
            linear_rows.check(i, mine_beside, its_beside)
        if _kind(mine) in _GROWING:
            _check_keys(i, mine, its)
        if not isinstance(mine, MemoryLayer):
            continue
        if mine.made_with and its.made_with and mine.made_with != its.made_with:
            raise ValueError(
                "the caches were filled with different memory weights (another compressor, adapter or dtype, or "
                "training went on in between): their rows cannot be continued by one model."
            )
        if mine.state is not None and its.state is not None:
            check_alike(mine.state, its.state)


def _kind(layer: Any) -> type:
    """The kind of a layer whose rows can be taken out, put in and joined.

    Raises:
        ValueError: if it is of another kind.
    """
    if type(layer) in (*_GROWING, MemoryLayer, HybridMemoryLayer, LinearAttentionLayer, *SHARING):
        return type(layer)
    if type(layer) in _FIXED:
        return _FIXED[type(layer)]
    raise ValueError(
        f"rows of a cache layer of type {type(layer).__name__} cannot be taken out, put in or joined: it may hold more "
        "than keys, values, a memory, a convolution or a recurrence. Keep a cache for each text; its rows can be "
        "reordered and repeated."
    )


def _holds_keys(layer: Any) -> bool:
    """Whether a layer that holds keys and values, or a memory, has got any."""
    return bool(getattr(layer, "is_initialized", False))


def _check_keys(i: int, mine: Any, its: Any) -> None:
    for name in ("keys", "values") if mine.is_initialized else ():
        u, v = getattr(mine, name), getattr(its, name)
        alike = (u.dtype, u.device, u.shape[1], u.shape[3]) == (v.dtype, v.device, v.shape[1], v.shape[3])
        if not alike or getattr(mine, "sliding_window", None) != getattr(its, "sliding_window", None):
            raise ValueError(
                f"layer {i}: {name} are {u.dtype} on {u.device} of shape {tuple(u.shape)} in one cache and {v.dtype} "
                f"on {v.device} of shape {tuple(v.shape)} in the other: expected caches of the same model."
            )


@contextmanager
def _broken_if_interrupted(layers: Sequence[Any]) -> Iterator[None]:
    """A cache in which some layers have other rows than the rest is unusable."""
    try:
        yield
    except BaseException:
        for layer in layers:
            if isinstance(layer, MemoryLayer):
                layer.broken = True
        raise
