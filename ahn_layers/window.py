"""The lossless short-term memory: which tokens it keeps, where each one sits, and which one leaves."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .ops.attend import InSlots, InWindow
from .ops.sharing import share_columns
from .tokens import Later, Leaving, Tokens, join

SinkPositions = Literal["trained", "streaming", "absolute"]


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

    def push(
        self, held: Held, new: Tokens, valid: Bool[Tensor, "b t"] | None = None
    ) -> tuple[InWindow | InSlots, Leaving, Held]:
        """Take tokens in: what their queries see here, what leaves, and what is held afterwards.

        Nothing is copied before it is asked for. Where ``held`` may be overwritten, it is when the new slots are asked
        for: ask for what leaves before.

        Args:
            held: what is held.
            new: the new tokens.
            valid: False at padding, which comes last in each row.
        """
        if len(new) == 1 and len(held.slots) == self.capacity:
            return self._step(held, new, None if valid is None else valid.squeeze(1))
        count, real = len(new), None if valid is None else valid.sum(dim=1)
        total = None if held.uniform is None or valid is not None else held.uniform + count
        turns = held.overwritten and total is not None and total - count >= self.capacity
        after = Held(
            Later(lambda: self._overwritten(held, new) if turns else self._slots_with(held, new, real)),
            held.seen + (count if real is None else real),
            None if held.length is None else held.length + count,
            held.padded or valid is not None,
            turns,
        )
        rank = Later(lambda: held.next_rank + torch.arange(count, device=new.k.device))
        if total is not None and total <= self.capacity:  # nothing leaves
            whole = Later(lambda: after.slots.columns(0, total) if held.uniform else new)
            seen = InWindow(
                Later(lambda: self._cut(whole(), held.uniform or 0)), rank, held.uniform, self.window_size,
                self.num_sinks, whole=Later(lambda: (whole().k, whole().v)),
            )  # fmt: skip
            return seen, Leaving(count, Later(lambda: new.columns(0, 0)), Later(lambda: None)), after

        context = join(*self._recent(held), new)
        past = len(context) - count
        spare = self.window_size - past  # query i pushes out column i - spare of the context, but no sink
        first = spare + (0 if held.uniform is None else max(0, self.num_sinks + past - held.uniform))
        if first >= count:
            first, leavers = count, context.columns(0, 0)
        else:
            bounds = (first - spare, count - spare)
            (k, evicted_k), (v, evicted_v) = share_columns((context.k, *bounds), (context.v, *bounds))
            leavers = Tokens(evicted_k, evicted_v, context.columns(*bounds).gates)
            context = Tokens(k, v, context.gates)

        def leaves() -> Tensor | None:
            if total is not None:
                return None
            arrival = torch.arange(first, count, device=new.k.device)
            out = self.leaves(held.seen.unsqueeze(1) + arrival)
            return out if real is None else out & (arrival < real.unsqueeze(1))

        begins = held.uniform == 0 and valid is None
        sinks = None if begins else self._sinks(held, new, after, valid)
        pieces = (None if sinks is None else (sinks.k, sinks.v), (context.k, context.v))
        seen = InWindow(Later(lambda: pieces), rank, held.uniform, self.window_size, self.num_sinks)
        return seen, Leaving(first, Later(lambda: leavers), Later(leaves)), after

    def _step(self, held: Held, new: Tokens, arrives: Bool[Tensor, " b"] | None) -> tuple[InSlots, Leaving, Held]:
        """One new token and every slot allocated: the token takes the slot of the one that leaves."""
        slot = self.slot(held.seen)

        def leaves() -> Tensor:
            out = self.leaves(held.seen)
            return (out if arrives is None else out & arrives).unsqueeze(1)

        slots = Later(lambda: held.slots.put(slot, new, arrives, inplace=held.overwritten))
        seen = held.seen + (1 if arrives is None else arrives.long())
        after = Held(
            slots,
            seen,
            None if held.length is None else held.length + 1,
            held.padded or arrives is not None,
            held.overwritten,
        )
        full = held.uniform is not None and held.uniform >= self.capacity
        rank = Later(lambda: held.seen.unsqueeze(1))
        view = InSlots(Later(lambda: (slots().k, slots().v)), rank, seen, full, self.num_sinks)
        return view, Leaving(0, Later(lambda: held.slots.take(slot.unsqueeze(1))), Later(leaves)), after

    def _cut(self, whole: Tokens, past: int) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
        """Sinks, unless the context begins with them, and context, of all tokens in the order of rank."""
        if past == 0:
            return None, (whole.k, whole.v)
        sinks, context = whole.columns(0, self.num_sinks), whole.columns(min(self.num_sinks, past), len(whole))
        return (sinks.k, sinks.v), (context.k, context.v)

    def _recent(self, held: Held) -> list[Tokens]:
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

    def _sinks(self, held: Held, new: Tokens, after: Held, valid: Tensor | None) -> Tokens:
        """The sinks once new tokens have arrived: as many columns as there may be, at most ``num_sinks``."""
        if valid is None and held.uniform is not None:
            count = min(held.uniform, self.num_sinks)
            return join(held.slots.columns(0, count), new.columns(0, self.num_sinks - count))
        return after.slots.columns(0, self.num_sinks)

    def _slots_with(self, held: Held, new: Tokens, real: Int[Tensor, " b"] | None) -> Tokens:
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

    def _overwritten(self, held: Held, new: Tokens) -> Tokens:
        """The same tensors, the last of the new tokens over the oldest."""
        assert held.uniform is not None
        start = max(0, len(new) - self.window_size)
        while start < len(new):
            slot = self.next_slot(held.uniform + start)
            size = min(len(new) - start, self.capacity - slot)
            held.slots.columns(slot, slot + size).zip(Tensor.copy_, new.columns(start, start + size))
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
