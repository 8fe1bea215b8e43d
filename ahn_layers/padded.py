"""Padding wherever it is: each part of a call takes its real tokens in first; what queries at padding see."""

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .arrivals import Arrivals
from .compressor import Compressor
from .eviction import Eviction, evict
from .ops.attention.attend import InSlots
from .positions import Positions
from .recall import recall
from .state import MemoryState
from .tokens import Later, Leaving, take

_LARGEST_MASK = 1 << 28
"""Entries of a dense mask of padded rows that is still made to get the bits of the base model."""


def in_parts(new: Arrivals, state: MemoryState) -> list[Arrivals]:
    """The tokens of a call, cut where real ones go on after padding.

    Without padding, and for a single token of a state whose slots are all allocated, they stay as they are.
    """
    if new.valid is None or _steps(new, state):
        return [new]
    dense, lossless = new.attention.dense, state.uniform == 0 and len(new) <= state.window.capacity
    if dense is not None and lossless and len(new.q) * len(new) ** 2 <= _LARGEST_MASK:
        out = dense(new.q, new.tokens.k, new.tokens.v, new.valid)
        if torch.compiler.is_compiling() or not bool(out.isnan().any()):  # of rows that see nothing, in float64
            order = _real_first(new.valid)
            return [replace(new, tokens=new.tokens.take(order), valid=new.valid.gather(1, order), out=out)]
    ends = _ends_of_padding(new.valid, state.seen)
    new = replace(new, attention=replace(new.attention, dense=None))
    return [new.columns(a, b) for a, b in pairwise((0, *ends, len(new)))] if ends else [new]


def padding_last(part: Arrivals, state: MemoryState) -> Arrivals:
    """One of these parts in the order in which the state takes it in.

    What is at padding may be anything, infinity or not a number too, which a weight of zero would not hide.
    """
    if part.valid is None or part.out is not None or _steps(part, state):
        return part
    return replace(part, tokens=part.tokens.zeroed(~part.valid.unsqueeze(1))).ordered(_real_first(part.valid))


def as_given(
    out: Float[Tensor, "b h t e"],
    part: Arrivals,
    given: Arrivals,
    state: MemoryState,
    compressor: Compressor | None,
    eviction: Eviction,
    positions: Positions,
) -> Float[Tensor, "b h t e"]:
    """The output of a part, in the order in which its tokens were given, and as queries at padding see the state."""
    if part.out is not None or given.valid is None:
        return out
    if part.order is None:  # a single token: its query has seen the state, if there is anything
        return out.masked_fill((state.seen == 0).view(-1, 1, 1, 1), 0)
    out = take(out, part.order.argsort(dim=1)).masked_fill(~given.valid[:, None, :, None], 0)
    return _attend_at_end(out, given, state, compressor, eviction, positions)


def _steps(new: Arrivals, state: MemoryState) -> bool:
    """Whether this is one token in each row of a state whose slots are all allocated."""
    return len(new) == 1 and len(state.slots) == state.window.capacity


def _real_first(valid: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    return (~valid).to(torch.uint8).argsort(dim=1, stable=True)


def _ends_of_padding(valid: Bool[Tensor, "b t"], seen: Int[Tensor, " b"]) -> list[int]:
    """Columns at which real tokens go on after padding, in a row that has had some."""
    if torch.compiler.is_compiling():
        return []
    begun = (valid.cumsum(dim=1) + seen.unsqueeze(1)) > 0
    goes_on = valid[:, 1:] & ~valid[:, :-1] & begun[:, :-1]
    return (goes_on.any(dim=0).nonzero().flatten() + 1).tolist()


def _attend_at_end(
    out: Float[Tensor, "b h t e"],
    new: Arrivals,
    state: MemoryState,
    compressor: Compressor | None,
    eviction: Eviction,
    positions: Positions,
) -> Float[Tensor, "b h t e"]:
    """The outputs, with those at padding behind the last real token: its queries see the state as it is now."""
    assert new.valid is not None
    follows = (new.valid.flip(1).cumsum(dim=1) == 0).flip(1) & (state.seen > 0).unsqueeze(1)
    count = len(new) if torch.compiler.is_compiling() else int(follows.sum(dim=1).max())
    if not count:
        return out
    q, x = new.q[:, :, -count:], None if new.x is None else new.x[:, -count:]
    slots, folds = state.slots, torch.zeros(len(q), count, dtype=torch.bool, device=q.device)
    rank = Later(lambda: (state.seen - 1).clamp(min=0).unsqueeze(1).expand(-1, count))
    nothing = Later(lambda: slots.columns(0, 1).map(lambda u: u.expand(*u.shape[:2], count, *u.shape[3:])))
    ranks = Later(lambda: torch.zeros_like(folds, dtype=torch.long))
    reads = (state.seen > state.window.capacity).unsqueeze(1).expand(-1, count)
    kept, leaving, _ = evict(eviction, state.kept, Leaving(0, nothing, Later(lambda: folds), ranks, reads), count)
    filled = InSlots(lambda: (slots.k, slots.v), rank, state.seen, False, min(positions.window.num_sinks, len(slots)))
    q_kept, kept = positions.facing_kept(q, kept)
    beside = [] if kept is None else [kept.of(0, count)]
    seen = new.attention.over_slots(q, filled, beside, positions.facing_sinks(q, rank, None), q_kept)
    recalled, _ = recall(compressor, state.memory, q, x, leaving, rank, positions)
    seen = seen if recalled is None else seen + recalled.to(seen.dtype)
    tail = torch.where(follows[:, None, -count:, None], seen, out[:, :, -count:])
    return torch.cat((out[:, :, : out.shape[2] - count], tail), dim=2)
