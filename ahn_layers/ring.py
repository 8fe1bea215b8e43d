"""Where the tokens of a window sit: sinks, then a ring in which a new token takes the place of the oldest."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .tokens import Later, Tokens, join


@dataclass(frozen=True, eq=False)
class Held:
    """What a window holds.

    Attributes:
        made: resident tokens, one column per slot; empty slots hold zeros.
        seen: real tokens seen so far, per row, ``(B,)`` int64.
        length: columns seen so far, padding included; None where it is known on the device only.
        padded: whether any column was padding, so that rows may have seen different numbers of tokens.
        overwritten: whether the tensors may be, or were, overwritten.
    """

    made: Later[Tokens]
    seen: Int[Tensor, " b"]
    length: int | None
    padded: bool
    overwritten: bool = False

    @property
    def slots(self) -> Tokens:
        """The resident tokens."""
        return self.made()

    @property
    def uniform(self) -> int | None:
        """Tokens seen by every row, None if rows may differ or the number is known on the device only."""
        return None if self.padded else self.length

    @property
    def next_rank(self) -> int | Int[Tensor, "b 1"]:
        """Rank of the next token: one number if it is the same in every row and known, else per row."""
        return self.seen.unsqueeze(1) if self.uniform is None else self.uniform


@dataclass(frozen=True)
class Ring:
    """The slots of a window: rank ``r`` sits in slot ``r`` if it is a sink, else in the ring behind the sinks.

    Args:
        window_size: slots of the ring.
        num_sinks: slots before it, never overwritten.
    """

    window_size: int
    num_sinks: int = 0

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

    def recent(self, held: Held) -> list[Tokens]:
        """The tokens of the window in the order of rank, the latest last, in pieces; columns before rank 0 are filler.

        As many columns as the fullest row can have; the tokens of rank below ``num_sinks`` are left out.
        """
        size = self.window_size
        if held.length is not None:
            size = min(size, max(0, held.length - self.num_sinks))
        if held.uniform is not None and held.uniform <= self.capacity:
            return [held.slots.columns(held.uniform - size, held.uniform)]
        if held.uniform is not None:
            oldest = self.next_slot(held.uniform)
            return [held.slots.columns(oldest, self.capacity), held.slots.columns(self.num_sinks, oldest)]
        rank = held.next_rank + torch.arange(-size, 0, device=held.seen.device)
        return [held.slots.take(self.slot(rank).clamp(min=0, max=max(len(held.slots) - 1, 0)))]

    def sinks(self, held: Held, new: Tokens, after: Held, valid: Tensor | None) -> Tokens:
        """The sinks once new tokens have arrived: as many columns as there may be, at most ``num_sinks``."""
        if valid is None and held.uniform is not None:
            count = min(held.uniform, self.num_sinks)
            return join(held.slots.columns(0, count), new.columns(0, self.num_sinks - count))
        return after.slots.columns(0, self.num_sinks)

    def slots_with(self, held: Held, new: Tokens, real: Int[Tensor, " b"] | None) -> Tokens:
        """Each slot keeps its token, or takes the last of the new ones that belongs there."""
        slots, size = held.slots, len(held.slots)
        uniform = None if real is not None else held.uniform
        if uniform == size and size + len(new) <= self.capacity:
            return slots.cat(new)
        if uniform is not None and uniform >= self.capacity:
            return self._around(slots, new, self.next_slot(uniform))
        if uniform == 0 and len(new) >= self.capacity:
            return self._around(new.columns(0, self.num_sinks), new.columns(self.num_sinks, len(new)), self.num_sinks)
        needed = self.capacity if held.length is None else min(self.capacity, held.length + len(new))
        slot = torch.arange(max(needed, size), device=held.seen.device)
        total = held.next_rank + (len(new) if real is None else real.unsqueeze(1))
        rank = self.resident(slot, torch.as_tensor(total, device=slot.device).view(-1, 1))
        rank = rank.squeeze(0) if isinstance(total, int) else rank
        source = torch.where(rank >= held.next_rank, size + rank - held.next_rank, slot)
        source = torch.where(rank < 0, size + len(new), source)  # empty slots take the column of zeros
        nothing = new.map(lambda u: u.new_zeros(*u.shape[:2], 1, *u.shape[3:]))
        return slots.cat(new, nothing).take(source)

    def overwritten(self, held: Held, new: Tokens) -> Tokens:
        """The same tensors, the last of the new tokens over the oldest."""
        assert held.uniform is not None
        start = max(0, len(new) - self.window_size)
        while start < len(new):
            slot = self.next_slot(held.uniform + start)
            size = min(len(new) - start, self.capacity - slot)
            written = new if size == len(new) else new.columns(start, start + size)
            held.slots.columns(slot, slot + size).zip(Tensor.copy_, written)
            start += size
        return held.slots

    def _around(self, slots: Tokens, new: Tokens, slot: int) -> Tokens:
        """New tokens from ``slot`` on, round the window and over the oldest; ``slots`` may lack a full window."""
        first, end, size, count = self.num_sinks, self.capacity, self.window_size, len(new)
        if count > size:  # only the last ones stay
            return self._around(slots, new.columns(count - size, count), first + (slot - first + count - size) % size)
        wrapped = max(0, slot + count - end)
        return slots.columns(0, first).cat(
            new.columns(count - wrapped, count),
            slots.columns(first + wrapped, slot),
            new.columns(0, count - wrapped),
            slots.columns(slot + count - wrapped, end),
        )
