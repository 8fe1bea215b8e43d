"""Which window a training batch sees: drawn at random, so that the memory serves every one."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..attention import HippocampalAttention
from ..evictions import SalientSlots
from ..memory import MemoryStore
from ..window import Window

CAPACITIES = tuple(32 << i for i in range(9))
"""Capacities to draw from, 32 to 8192 (arXiv 2510.07318)."""
SINKS = (0, 32, 64, 128, 512, 2048, 4096)
"""Numbers of sinks to draw from, those up to half the capacity."""


def sample_window(
    length: int,
    generator: torch.Generator | None = None,
    *,
    shortest: float = 1 / 8,
    sinks: Sequence[int] = SINKS,
) -> tuple[int, int]:
    """Draw a window for a batch of sequences, as the paper does (arXiv 2510.07318, appendix).

    The capacity is one of 32, 64, ..., 8192 that lies strictly between ``shortest * length`` and ``length``; the sinks
    are one of 0, 32, 64, 128, 512, 2048, 4096 up to half of it. Where no capacity qualifies, the paper's rule has
    nothing to draw: a text too long for all of them gets the largest, one of 32 tokens or fewer half its length.

    Args:
        length: tokens in each sequence, at least 1.
        generator: source of randomness on the CPU, the global one by default.
        shortest: smallest capacity as a share of the length, exclusive. 0 draws from every capacity: short windows make
            the memory work harder (SWAX, ICLR 2026).
        sinks: numbers of sinks to draw from; 0 is drawn where all of them are more than half the capacity. Without any
            sink many models break down, and the memory spends itself on that: leave 0 out if you will use some.

    Returns:
        ``(window_size, num_sinks)``; their sum is the capacity.

    Raises:
        ValueError: if ``length`` is not positive, or ``shortest`` is not in [0, 1).

    Examples:
        >>> sample_window(2048, torch.Generator().manual_seed(0))[0] in (256, 384, 448, 480, 512, 896, 960, 992, 1024)
        True
        >>> sample_window(10)
        (5, 0)
    """
    if length < 1:
        raise ValueError(f"length={length}: expected at least one token.")
    if not 0 <= shortest < 1:
        raise ValueError(f"shortest={shortest}: expected a share of the length in [0, 1).")
    capacities = [c for c in CAPACITIES if shortest * length < c < length]
    if not capacities:
        below = [c for c in CAPACITIES if c < length]
        capacities = [below[-1] if below else max(1, length // 2)]
    capacity = _pick(capacities, generator)
    num_sinks = _pick([s for s in sinks if s <= capacity // 2] or [0], generator)
    return capacity - num_sinks, num_sinks


def _pick(choices: list[int], generator: torch.Generator | None) -> int:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


@contextmanager
def use_window(model: nn.Module, window_size: int, num_sinks: int = 0) -> Iterator[None]:
    """Give every memory in the model another window, for one training batch.

    With gradient checkpointing the backward pass runs the layers again: it has to be inside as well. Caches that were
    filled with another window are refused, as always.

    Args:
        model: any model with [`HippocampalAttention`][ahn_layers.HippocampalAttention] blocks.
        window_size: most recent tokens kept, sinks not counted.
        num_sinks: first tokens kept.

    Raises:
        ValueError: if the model has no memory, or a size is out of range.
    """
    blocks = [module for module in model.modules() if isinstance(module, HippocampalAttention)]
    stores = [store for block in blocks for store in block.memory.modules() if isinstance(store, MemoryStore)]
    if not stores:
        raise ValueError(f"{type(model).__name__} has no HippocampalAttention: call retrofit(model, ...) first.")
    with give_windows(
        stores, [replace(store.window, window_size=window_size, num_sinks=num_sinks) for store in stores]
    ):
        yield


def refuse_sliding(blocks: Iterable[Any], length: int) -> None:
    """Raise a ValueError if texts of this length are longer than a block's own sliding window."""
    own = {u.layer_idx: u.found.native_window for u in blocks if getattr(u, "found", None) is not None}
    own = {layer: size for layer, size in own.items() if size is not None and size < length}
    if own:
        raise ValueError(
            f"texts of {length} tokens and layers with sliding windows of their own, {own}: what they lose is measured "
            "against full attention, which they do not have. Pass texts no longer than these windows, or layers= "
            "without them."
        )


@contextmanager
def give_windows(stores: Sequence[MemoryStore], windows: Sequence[Window]) -> Iterator[None]:
    """Within this context, each memory has another window."""
    before = [store.window for store in stores]
    for store, window in zip(stores, windows, strict=True):
        store.window = window
    try:
        yield
    finally:
        for store, window in zip(stores, before, strict=True):
            store.window = window


@contextmanager
def longer_windows(model: nn.Module) -> Iterator[None]:
    """Within this context, each window is longer by the mean number of slots: the window alone at equal capacity."""
    stores = [module.store for module in model.modules() if isinstance(module, HippocampalAttention)]
    more = [store.eviction.num_slots if isinstance(store.eviction, SalientSlots) else 0 for store in stores]
    mean = math.ceil(sum(more) / max(1, len(more)))
    with give_windows(stores, [replace(u.window, window_size=u.window.window_size + mean) for u in stores]):
        yield
