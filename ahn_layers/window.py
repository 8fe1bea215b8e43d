"""The lossless short-term memory: which tokens it keeps, where each one sits, and which one leaves."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from .ops.attention.attend import InSlots, InWindow
from .ops.attention.sharing import share_columns
from .ring import Held, Ring
from .tokens import Later, Leaving, Tokens, join

SinkPositions = Literal["trained", "streaming", "absolute"]


@dataclass(frozen=True)
class Window(Ring):
    """Attention sinks and a sliding window over one row of ``num_sinks + window_size`` slots.

    A token's *rank* is its number among the real tokens of its row, from 0; padding has none. Rank ``r`` sits in slot
    ``r`` if ``r < num_sinks`` (a sink, never evicted), else in slot ``num_sinks + (r - num_sinks) % window_size``: when
    the window is full, a new token takes the place of the one that leaves. Keys carry their rotation, so the order of
    the slots does not matter.

    Args:
        window_size: most recent tokens kept, the current one included, sinks not.
        num_sinks: first tokens, which are never evicted (arXiv 2309.17453).
        sink_positions: which distance to the sinks the model is shown. ``"absolute"``: the true one, as in the paper
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

    sink_positions: SinkPositions = "trained"

    def __post_init__(self) -> None:
        for name, least in (("window_size", 1), ("num_sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}.")
        if self.sink_positions not in get_args(SinkPositions):
            raise ValueError(f"sink_positions={self.sink_positions!r}: expected one of {get_args(SinkPositions)}.")

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
            Later(lambda: self.overwritten(held, new) if turns else self.slots_with(held, new, real)),
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

        context = join(*self.recent(held), new)
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
        sinks = None if begins else self.sinks(held, new, after, valid)
        pieces = (None if sinks is None else (sinks.k, sinks.v), (context.k, context.v))
        seen = InWindow(Later(lambda: pieces), rank, held.uniform, self.window_size, self.num_sinks)
        ranks = Later(lambda: held.next_rank + torch.arange(first, count, device=new.k.device) - self.window_size)
        return seen, Leaving(first, Later(lambda: leavers), Later(leaves), ranks), after

    def _step(self, held: Held, new: Tokens, arrives: Bool[Tensor, " b"] | None) -> tuple[InSlots, Leaving, Held]:
        """One new token and every slot allocated: the token takes the slot of the one that leaves."""
        full = held.uniform is not None and held.uniform >= self.capacity
        if full and arrives is None and not torch.compiler.is_compiling():
            return self._turn(held, new)
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
        rank = Later(lambda: held.seen.unsqueeze(1))
        reads = None
        if arrives is not None:  # a query at padding sees what the last real token saw
            rank = Later(lambda: (seen - 1).clamp(min=0).unsqueeze(1))
            reads = self.leaves(seen - 1).unsqueeze(1)
        view = InSlots(Later(lambda: (slots().k, slots().v)), rank, seen, full, self.num_sinks)
        leavers = Later(lambda: held.slots.take(slot.unsqueeze(1)))
        ranks = Later(lambda: held.seen.unsqueeze(1) - self.window_size)
        return view, Leaving(0, leavers, Later(leaves), ranks, reads), after

    def _turn(self, held: Held, new: Tokens) -> tuple[InSlots, Leaving, Held]:
        """The same where all slots are filled and it is one slot in every row, whose number is known."""
        assert held.uniform is not None
        slot = self.next_slot(held.uniform)
        leavers = Later(lambda: held.slots.map(lambda u: u[:, :, slot : slot + 1].clone()))  # it is written to
        slots = Later(lambda: self.overwritten(held, new) if held.overwritten else self.slots_with(held, new, None))
        seen = held.seen + 1
        after = Held(slots, seen, held.uniform + 1, held.padded, held.overwritten)
        rank = Later(lambda: held.seen.unsqueeze(1))
        ranks = Later(lambda: held.seen.unsqueeze(1) - self.window_size)
        view = InSlots(Later(lambda: (slots().k, slots().v)), rank, seen, True, self.num_sinks)
        return view, Leaving(0, leavers, Later(lambda: None), ranks), after

    def _cut(self, whole: Tokens, past: int) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
        """Sinks, unless the context begins with them, and context, of all tokens in the order of rank."""
        if past == 0:
            return None, (whole.k, whole.v)
        sinks, context = whole.columns(0, self.num_sinks), whole.columns(min(self.num_sinks, past), len(whole))
        return (sinks.k, sinks.v), (context.k, context.v)
