"""A cache during one call: either every layer takes the new tokens in, or none does."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..compressor import State
from ..state import MemoryState
from . import native_layer
from .cache_layers import MemoryLayer
from .static_layer import StaticMemoryLayer

_OPEN = "_hippocampal_snapshot"
_NOTES = ("was_empty", "place")
"""What is saved of a layer beside its attributes."""
_LARGE = 1 << 22
"""Bytes of a state that are not kept a second time while a call runs."""


class _Prefix(NamedTuple):
    """A state as the beginning of a longer one, from which nothing has left."""

    length: int
    memory: State | None
    kept: dict[str, Tensor]

    def of(self, longer: MemoryState) -> MemoryState:
        """The state."""
        seen = torch.full_like(longer.seen, self.length)
        slots = longer.slots.columns(0, self.length)
        return replace(longer, slots=slots, seen=seen, length=self.length, memory=self.memory, kept=self.kept)


class _Place(NamedTuple):
    """Where the tokens of a layer of fixed addresses ended, and how many columns come."""

    seen: Tensor
    pads: Tensor
    coming: int

    def put_back(self, layer: StaticMemoryLayer, state: MemoryState) -> bool:
        """Take out what has come since, if nothing can have left the window: then it stands in slots of its own."""
        if bool((self.seen + self.coming > state.window.capacity).any()):
            return False
        if state.seen.is_inference() and not torch.is_inference_mode_enabled():
            return True  # it was copied before it was written to
        with torch.no_grad():
            come = torch.arange(len(state.slots), device=self.seen.device) >= self.seen.unsqueeze(1)
            state.slots.map(lambda u: u.masked_fill_(come.view(len(come), 1, -1, *[1] * (u.ndim - 3)), 0))
            state.seen.copy_(self.seen)
            layer.pads.copy_(self.pads)
        state.length, state.padded = None, True
        return True


class Snapshot:
    """A cache as it was before a call."""

    def __init__(self, cache: Cache, count: int) -> None:
        self.layers = list(cache.layers)
        self.saved = [_save(layer, count) for layer in self.layers]

    def restore(self, cache: Cache) -> None:
        """Put every layer back; where that is impossible, the cache refuses to be used.

        If that is interrupted too, as by a device that has no memory left, it is done again before the next use.
        """
        try:
            possible = [_put_back(layer, saved) for layer, saved in zip(self.layers, self.saved, strict=True)]
        except BaseException:
            setattr(cache, _OPEN, self)
            raise
        fresh = [layer for layer in cache.layers if not any(layer is old for old in self.layers)]
        cache.layers[:] = self.layers
        if all(possible):
            return
        for layer in (*self.layers, *fresh):
            if isinstance(layer, MemoryLayer):
                layer.broken = True


def begin(cache: Cache, count: int) -> None:
    """Remember the cache as it is; a call that was interrupted before is undone first.

    Args:
        cache: the cache.
        count: columns that the call brings.
    """
    settle(cache)
    setattr(cache, _OPEN, Snapshot(cache, count))


def complete(cache: Cache) -> Snapshot | None:
    """The call has gone through all layers.

    Returns:
        The cache as it was before the call, if that was remembered.
    """
    snapshot: Snapshot | None = cache.__dict__.pop(_OPEN, None)
    return snapshot


def length_before(cache: Cache, layer_idx: int) -> int | None:
    """Columns that a layer held before a call that is not completed; None if there is no such call."""
    snapshot: Snapshot | None = getattr(cache, "__dict__", {}).get(_OPEN)
    if snapshot is None:
        return None
    counting = [i for i, layer in enumerate(snapshot.layers) if hasattr(layer, "is_initialized")]
    if layer_idx < len(snapshot.layers) and layer_idx not in counting:
        if not counting:
            return None
        layer_idx = counting[0]  # a recurrence counts nothing: as transformers does, ask a layer that attends
    if layer_idx >= len(snapshot.layers) or not snapshot.layers[layer_idx].is_initialized:
        return 0
    saved, length = snapshot.saved[layer_idx], None
    if isinstance(snapshot.layers[layer_idx], MemoryLayer):
        state, place = saved[0]["state"], saved[0].get("place")
        length = 0 if state is None else state.length
        if place is not None and not torch.compiler.is_compiling():
            length = int(place.seen[0] + place.pads[0])
    elif isinstance(saved, tuple):
        length = saved[0].get("length")
    return length


def settle(cache: Any) -> None:
    """Undo a call that has not been completed, if there is one."""
    snapshot = getattr(cache, "__dict__", {}).pop(_OPEN, None)
    if snapshot is not None:
        snapshot.restore(cache)


def settle_for_use(cache: Any) -> None:
    """``settle``, before something is done with the cache.

    Raises:
        RuntimeError: if a call was interrupted that could not be undone.
    """
    settle(cache)
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, MemoryLayer):
            layer.refuse_broken()


def _save(layer: Any, count: int) -> Any:
    if not isinstance(layer, MemoryLayer):
        return native_layer.save(layer)
    linear = getattr(layer, "linear", None)  # a recurrence beside the attention
    return _save_memory(layer, count), None if linear is None else (linear, native_layer.save(linear))


def _save_memory(layer: MemoryLayer, count: int) -> dict[str, Any]:
    """What ``_put_memory_back`` needs to undo the calls to come, unless they write into tensors that are there now.

    A large window that grows is not held on to, which would take its memory twice: the tokens of a longer one begin
    with the same. Only a call that fills it up cannot be undone then.
    """
    layer.overwritten = False
    saved, state = dict(vars(layer)) | {"was_empty": layer.is_empty}, layer.state
    if isinstance(layer, StaticMemoryLayer) and state is not None and not layer.is_empty:
        saved["place"] = _Place(state.seen.clone(), layer.pads.clone(), count)
    if not layer.grows or state is None or layer.recording is not None or state.nbytes <= _LARGE:
        return saved
    if state.uniform is not None and state.uniform < state.window.capacity:
        saved["state"] = _Prefix(state.uniform, state.memory, state.kept)
    return saved


def _put_memory_back(layer: MemoryLayer, before: dict[str, Any]) -> bool:
    """Go back to what was saved, if that is possible."""
    place: _Place | None = before.get("place")
    if not layer.grows and (before["was_empty"] or layer.is_empty):
        layer.reset()
        return True
    if layer.edits != before["edits"]:
        return layer.state is None
    if layer.overwritten and not (
        isinstance(layer, StaticMemoryLayer) and place is not None and place.put_back(layer, before["state"])
    ):
        return False
    if isinstance(before["state"], _Prefix):
        assert layer.state is not None
        if layer.state.uniform is None or layer.state.uniform > layer.state.window.capacity:
            return False
        before = before | {"state": before["state"].of(layer.state)}
    layer.__dict__.clear()
    layer.__dict__.update({name: value for name, value in before.items() if name not in _NOTES})
    return True


def _put_back(layer: Any, saved: Any) -> bool:
    if not isinstance(layer, MemoryLayer):
        return native_layer.put_back(layer, saved)
    memory, linear = saved
    possible = _put_memory_back(layer, memory)
    return (linear is None or native_layer.put_back(*linear)) and possible
