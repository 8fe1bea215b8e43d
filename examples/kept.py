"""Which tokens of a text a memory with slots holds without loss, read from its cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ahn_layers import HippocampalCache, MemoryState, Window

RANK, PRIORITY = "gates.eviction.rank", "gates.eviction.priority"
"""Among what ``SalientSlots`` keeps: number and priority of each kept token."""
LEVELS = (0.05, 0.2, 0.5, 1.0)
"""Shades of kept tokens: the largest share of heads of each."""


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Which tokens of a text each key/value head sees without loss, once ``T`` tokens have been read.

    Attributes:
        layers: indices of the ``L`` layers that have slots. Other layers are left out.
        heads: key/value heads of each of these layers.
        slots: slots of each head, by layer.
        kept: True where a head keeps a token in a slot, shape (L, G, T) with the largest number of heads ``G``.
        priority: of kept tokens, NaN elsewhere, same shape.
        window: sinks and window, which every head sees.
    """

    layers: list[int]
    heads: list[int]
    slots: list[int]
    kept: Tensor
    priority: Tensor
    window: Window

    @property
    def seen(self) -> int:
        """Tokens read."""
        return self.kept.shape[2]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Place among the layers and number of each head."""
        return [(place, head) for place, heads in enumerate(self.heads) for head in range(heads)]

    @property
    def sinks(self) -> Tensor:
        """True at sinks, shape (T,)."""
        return torch.arange(self.seen) < self.window.num_sinks

    @property
    def recent(self) -> Tensor:
        """True at tokens in the window, shape (T,)."""
        return (torch.arange(self.seen) >= self.seen - self.window.window_size) & ~self.sinks

    @property
    def share(self) -> Tensor:
        """Share of the heads that see each token without loss, shape (T,): 1 for sinks and window."""
        in_slots = self.kept.sum(dim=(0, 1)) / len(self.rows)
        return in_slots.masked_fill(self.sinks | self.recent, 1.0)

    @property
    def order(self) -> Tensor:
        """Place of each kept token in its head's order of priority, up to 1 for the highest; NaN where not kept.

        Priorities of different heads have different scales, so pictures show this.
        """
        place = self.priority.argsort(dim=2, stable=True).argsort(dim=2) + 1  # NaN comes last
        return (place / self.kept.sum(dim=2, keepdim=True)).masked_fill(~self.kept, math.nan)

    @property
    def marks(self) -> list[str]:
        """The key of ``STYLES`` for each token."""
        levels = torch.bucketize(self.share, torch.tensor(LEVELS)) + (self.share > 0)
        kinds = zip(self.sinks.tolist(), self.recent.tolist(), levels.tolist(), strict=True)
        return ["sinks" if sink else "window" if recent else str(level or "") for sink, recent, level in kinds]

    def keepers(self, rank: int) -> Iterator[tuple[int, list[tuple[int, float]]]]:
        """For each layer that keeps a token: its index, and its heads with their priorities."""
        for layer, kept, priority in zip(self.layers, self.kept[:, :, rank], self.priority[:, :, rank], strict=True):
            heads = kept.nonzero().flatten().tolist()
            if heads:
                yield layer, [(head, float(priority[head])) for head in heads]


def kept_tokens(cache: Any, row: int = 0) -> KeptTokens:
    """Read from a cache which tokens are kept.

    Args:
        cache: of a model whose memory has ``SalientSlots``, after it has read a text.
        row: which text of the batch; its tokens are counted without padding.

    Raises:
        ValueError: if no layer has slots, nothing has been read, or the layers have different windows.
    """
    states = {i: getattr(layer, "state", None) for i, layer in enumerate(cache.layers)}
    found = {i: u for i, u in states.items() if isinstance(u, MemoryState) and {RANK, PRIORITY} <= u.kept.keys()}
    if not found:
        raise ValueError(
            "no layer of this cache has slots. Retrofit the model with eviction=SalientSlots(...), then let it read a "
            "text."
        )
    first = next(iter(found.values()))
    if any(state.window != first.window for state in found.values()):
        raise ValueError("the layers have different windows: expected one for all, to mark a text by.")
    heads = [len(state.kept["filled"][row]) for state in found.values()]
    shape = (len(found), max(heads), int(first.seen[row]))
    kept, priority = torch.zeros(shape, dtype=torch.bool), torch.full(shape, math.nan)
    for place, state in enumerate(found.values()):
        filled, ranks, values = (state.kept[name][row].cpu() for name in ("filled", RANK, PRIORITY))
        for head, size in enumerate(filled.tolist()):
            kept[place, head, ranks[head, :size]] = True
            priority[place, head, ranks[head, :size]] = values[head, :size].float()
    slots = [state.kept[RANK].shape[2] for state in found.values()]
    return KeptTokens(list(found), heads, slots, kept, priority, first.window)


@torch.no_grad()
def read(model: Any, ids: Tensor, chunk: int) -> HippocampalCache:
    """Let a model read a text, chunk by chunk.

    Args:
        model: a retrofitted causal language model of transformers.
        ids: token ids, shape (1, T).
        chunk: tokens per call.
    """
    cache = HippocampalCache()
    with tqdm(total=ids.shape[1], desc="reading", unit=" tokens") as bar:
        for part in ids.split(chunk, dim=1):
            model(part, cache=cache, use_cache=True, logits_to_keep=1)
            bar.update(part.shape[1])
    return cache
