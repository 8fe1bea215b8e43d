"""A cache at fixed addresses for a while: every layer with all slots allocated, and growing again afterwards."""

import warnings
from typing import Any

import torch

from .cache_layers import MemoryLayer
from .static_layer import StaticMemoryLayer
from .transaction import settle, settle_for_use


def can_be_fixed(cache: Any) -> bool:
    """Whether all layers of a cache hold a memory that grows and records nothing, with or without tokens."""
    return len(cache.layers) > 0 and all(type(u) is MemoryLayer and not u.record_past for u in cache.layers)


def fix(cache: Any) -> None:
    """Put layers of fixed addresses, with the same rows, in the place of those that grow.

    A cache that cannot be fixed stays as it is: where gradients are recorded; without tokens; with a row that ends in
    padding, since recorded steps do not note where that ends; or, with a warning, without memory for a full window.
    """
    settle_for_use(cache)
    growing = list(cache.layers)
    if torch.is_grad_enabled() or not can_be_fixed(cache):
        return
    if any(u.state is None or (u.padding is not None and u.padding.is_open) for u in growing):
        return
    try:
        cache.layers[:] = [StaticMemoryLayer.in_place_of(layer) for layer in growing]
    except torch.OutOfMemoryError as error:
        warnings.warn(
            f"decoding runs without a CUDA graph, there is no memory for a full window: {error}", stacklevel=2
        )
        return
    for layer in growing:
        layer.state = None  # the other layer holds it


def is_fixed(cache: Any) -> bool:
    """Whether a cache has fixed addresses for a while."""
    return any(_stands_in(layer) for layer in cache.layers)


def is_traced() -> bool:
    """Whether code is being compiled or recorded, which must not ask the device for numbers."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def release(cache: Any) -> None:
    """Put the layers that grow back, with the tokens that there are now; nothing to do for any other cache.

    If a call broke off between two layers, the cache is unusable from here on.
    """
    fixed = [layer for layer in cache.layers if _stands_in(layer)]
    if not fixed:
        return
    settle(cache)
    seen, pads = torch.stack([torch.stack((layer.state.seen, layer.pads)) for layer in fixed], dim=1).cpu()
    ends = seen + pads
    length, agree = int(ends[0, 0]), bool((ends == ends[0, 0]).all())
    layers = [layer.released(length, padded=bool(pads.any())) if layer in fixed else layer for layer in cache.layers]
    for layer in () if agree else layers:
        layer.broken = True
    cache.layers[:] = layers


def _stands_in(layer: Any) -> bool:
    return isinstance(layer, StaticMemoryLayer) and layer.growing is not None
