"""The lossless short-term memory: which tokens it keeps, where each one sits, and which one leaves."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SinkPositions = Literal["trained", "streaming", "absolute"]


@dataclass(frozen=True)
class Window:
    """Attention sinks and a sliding window over one row of ``num_sinks + window_size`` slots.

    A token's *rank* is its number among the real tokens of its row, from 0; padding has none. Rank ``r`` sits in slot
    ``r`` if ``r < num_sinks`` (a sink, kept for ever), else in slot ``num_sinks + (r - num_sinks) % window_size``: when
    the window is full, a new token takes the place of the one that leaves. Keys carry their rotation, so the order of
    the slots does not matter.

    Args:
        window_size: most recent tokens kept, the current one included, sinks not.
        num_sinks: first tokens kept for ever (arXiv 2309.17453).
        sink_positions: how far away the sinks may seem to a query. ``"absolute"``: as far as they are, as in the paper
            (arXiv 2510.07318); beyond the base model's trained length its quality collapses. ``"streaming"``: at most
            ``capacity - 1``. ``"trained"``: at most the base model's trained length, so equal to ``"absolute"`` inside
            it and still in distribution beyond.

    Raises:
        ValueError: if a size is not a whole number in its range, or ``sink_positions`` is unknown.

    Examples:
        >>> window = Window(window_size=4, num_sinks=2)
        >>> window.slot(torch.arange(8))
        tensor([0, 1, 2, 3, 4, 5, 2, 3])
    """

    window_size: int
    num_sinks: int = 0
    sink_positions: SinkPositions = "trained"

    def __post_init__(self) -> None:
        for name, least in (("window_size", 1), ("num_sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}.")
        if self.sink_positions not in get_args(SinkPositions):
            raise ValueError(f"sink_positions={self.sink_positions!r}: expected one of {get_args(SinkPositions)}.")

    @property
    def capacity(self) -> int:
        """Tokens kept without loss: ``num_sinks + window_size``."""
        return self.num_sinks + self.window_size

    def slot(self, rank: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The slot that the token of this rank takes."""
        return torch.where(rank < self.num_sinks, rank, self.num_sinks + (rank - self.num_sinks) % self.window_size)

    def next_slot(self, seen: int) -> int:
        """The slot that the next token takes once ``seen`` tokens have filled them all: that of the window's oldest."""
        return self.num_sinks + (seen - self.num_sinks) % self.window_size

    def resident(self, slot: Int[Tensor, " c"], seen: Int[Tensor, "b 1"]) -> Int[Tensor, "b c"]:
        """Rank of the token that sits in each slot once ``seen`` tokens have arrived, -1 for an empty slot."""
        newest = seen - 1 - self.num_sinks
        in_ring = self.num_sinks + newest - (newest - (slot - self.num_sinks)) % self.window_size
        rank = torch.where(slot < self.num_sinks, slot, in_ring)
        empty = (rank >= seen) | ((slot >= self.num_sinks) & (rank < self.num_sinks))
        return torch.where(empty, -1, rank)

    def leaves(self, rank: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Whether the arrival of this rank pushes a token out: the one of rank ``rank - window_size``."""
        return rank >= self.capacity

    def farthest_sink(self, trained_length: int) -> int | None:
        """Largest distance from a query to sink 0 that is shown to the model, None for the true distance."""
        if self.sink_positions == "absolute" or self.num_sinks == 0:
            return None
        if self.sink_positions == "streaming":
            return self.capacity - 1
        return max(trained_length, self.capacity) - 1
