"""A cache during one call: either every layer takes the new tokens in, or none does."""

from typing import Any

from transformers.cache_utils import Cache

from . import native_layer
from .cache_layers import MemoryLayer

_OPEN = "_hippocampal_snapshot"


class Snapshot:
    """A cache as it was before a call.

    Args:
        cache: the cache.
    """

    def __init__(self, cache: Cache) -> None:
        self.layers = list(cache.layers)
        self.saved = [_save(layer) for layer in self.layers]

    def restore(self, cache: Cache) -> None:
        """Put every layer back; where that is impossible, the cache refuses to be used."""
        possible = [_put_back(layer, saved) for layer, saved in zip(self.layers, self.saved, strict=True)]
        fresh = [layer for layer in cache.layers if not any(layer is old for old in self.layers)]
        cache.layers[:] = self.layers
        if all(possible):
            return
        for layer in (*self.layers, *fresh):
            if isinstance(layer, MemoryLayer):
                layer.broken = True


def begin(cache: Cache) -> None:
    """Remember the cache as it is; a call that was interrupted before is undone first."""
    settle(cache)
    setattr(cache, _OPEN, Snapshot(cache))


def complete(cache: Cache) -> None:
    """The call has gone through all layers."""
    cache.__dict__.pop(_OPEN, None)


def settle(cache: Any) -> None:
    """Undo a call that has not been completed, if there is one."""
    snapshot = getattr(cache, "__dict__", {}).pop(_OPEN, None)
    if snapshot is not None:
        snapshot.restore(cache)


def _save(layer: Any) -> Any:
    return layer.snapshot() if isinstance(layer, MemoryLayer) else native_layer.save(layer)


def _put_back(layer: Any, saved: Any) -> bool:
    return layer.restore(saved) if isinstance(layer, MemoryLayer) else native_layer.put_back(layer, saved)
