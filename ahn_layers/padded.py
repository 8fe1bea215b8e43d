"""What queries at padding see, and where a call with padding has to be cut."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .compressor import Compressor
from .eviction import Eviction, evict
from .ops.attention.attend import InSlots, SoftmaxAttention
from .positions import Positions
from .recall import recall
from .state import MemoryState
from .tokens import Later, Leaving

LARGEST_MASK = 1 << 28
"""Entries of a dense mask of padded rows that is still made to get the bits of the base model."""


def ends_of_padding(valid: Bool[Tensor, "b t"], seen: Int[Tensor, " b"]) -> list[int]:
    """Columns at which real tokens go on after padding, in a row that has had some: a call is cut there."""
    if torch.compiler.is_compiling():
        return []
    begun = (valid.cumsum(dim=1) + seen.unsqueeze(1)) > 0
    goes_on = valid[:, 1:] & ~valid[:, :-1] & begun[:, :-1]
    return (goes_on.any(dim=0).nonzero().flatten() + 1).tolist()


def attend_at_end(
    out: Float[Tensor, "b h t e"],
    q: Float[Tensor, "b h t d"],
    x: Float[Tensor, "b t n"] | None,
    state: MemoryState,
    valid: Bool[Tensor, "b t"],
    attention: SoftmaxAttention,
    compressor: Compressor | None,
    eviction: Eviction,
    positions: Positions,
) -> Float[Tensor, "b h t e"]:
    """The outputs, with those at padding behind the last real token: its queries see the state as it is now."""
    follows = (valid.flip(1).cumsum(dim=1) == 0).flip(1) & (state.seen > 0).unsqueeze(1)
    count = q.shape[2] if torch.compiler.is_compiling() else int(follows.sum(dim=1).max())
    if not count:
        return out
    q, x = q[:, :, -count:], None if x is None else x[:, -count:]
    slots, folds = state.slots, torch.zeros(len(q), count, dtype=torch.bool, device=q.device)
    rank = Later(lambda: (state.seen - 1).clamp(min=0).unsqueeze(1).expand(-1, count))
    nothing = Later(lambda: slots.columns(0, 1).map(lambda u: u.expand(*u.shape[:2], count, *u.shape[3:])))
    ranks = Later(lambda: torch.zeros_like(folds, dtype=torch.long))
    reads = (state.seen > state.window.capacity).unsqueeze(1).expand(-1, count)
    kept, leaving, _ = evict(eviction, state.kept, Leaving(0, nothing, Later(lambda: folds), ranks, reads), count)
    filled = InSlots(lambda: (slots.k, slots.v), rank, state.seen, False, min(positions.window.num_sinks, len(slots)))
    q_kept, kept = positions.facing_kept(q, kept)
    beside = [] if kept is None else [kept.of(0, count)]
    seen = attention.over_slots(q, filled, beside, positions.facing_sinks(q, rank, None), q_kept)
    recalled, _ = recall(compressor, state.memory, q, x, leaving, rank, positions)
    seen = seen if recalled is None else seen + recalled.to(seen.dtype)
    tail = torch.where(follows[:, None, -count:, None], seen, out[:, :, -count:])
    return torch.cat((out[:, :, : out.shape[2] - count], tail), dim=2)
