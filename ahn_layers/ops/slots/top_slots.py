"""Running top-k: keeps the tokens with the highest priorities, separately for each key/value head.

Dimensions: b batch, g key/value heads, e slots, n arrivals.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import forms

_CHUNK = {"cpu": 128}
"""Arrivals compared with each other at once, by device type."""
_LARGE_CHUNK = 512
"""On any other device, where launches cost more than comparisons."""

Chosen = tuple[Int[Tensor, "b g m"], Int[Tensor, "b g n"], Int[Tensor, "b g e"], Int[Tensor, "b g"]]


def running_top(
    priority: Float[Tensor, "b g m"],
    rank: Int[Tensor, "b g m"],
    filled: Int[Tensor, "b g"],
    where: Bool[Tensor, "b g n"],
) -> Chosen:
    """After every arrival the ``e`` tokens of highest priority are kept and the one that is then too many is lost.

    Priorities do not change, so it does not matter how the arrivals are cut into calls. Among equal ones the token of
    lower rank stays.

    Args:
        priority: of the tokens in the slots, then of the arrivals.
        rank: likewise; what arrives has a higher one than all that were there before.
        filled: how many slots are.
        where: False where none arrives.

    Returns:
        Tokens are numbered: the slots, then the arrivals. For each token the arrival that it is lost at (``n`` if it
        is not); the token that is lost at each arrival (``e + n`` if none is); the tokens in the slots afterwards; and
        how many slots are filled.
    """
    count, device = where.shape[2], priority.device
    slots = priority.shape[2] - count
    priority = torch.where(priority.isnan(), float("-inf"), priority)
    if count == 1:
        return _one_more(priority, rank, filled, where.squeeze(2))
    here = torch.arange(slots, device=device) < filled.unsqueeze(2)
    if forms.chooses_in_triton(priority):
        from . import triton_top

        valid = torch.cat((here, where), dim=2)
        lost_at = triton_top.lost(priority, rank, valid, slots)
        return lost_at, *_outcome(lost_at, valid, slots)
    kept = torch.arange(slots, device=device).expand_as(here)
    lost_at = torch.full_like(priority, count, dtype=torch.long)
    loser = torch.full_like(where, slots + count, dtype=torch.long)
    size = _CHUNK.get(device.type, _LARGE_CHUNK)
    for start in range(0, count, size):
        stop = min(start + size, count)
        index = torch.cat(
            (kept, torch.arange(slots + start, slots + stop, device=device).expand(*kept.shape[:2], -1)), 2
        )
        valid = torch.cat((here, where[:, :, start:stop]), dim=2)
        at = _lost(priority.gather(2, index), rank.gather(2, index), valid, slots)  # within the chunk
        lost_at.scatter_(2, index, torch.where(at < stop - start, at + start, lost_at.gather(2, index)))
        gone, chosen, now = _outcome(at, valid, slots)
        loser[:, :, start:stop] = torch.where(
            gone < index.shape[2], index.gather(2, gone.clamp(max=index.shape[2] - 1)), slots + count
        )
        kept, here = index.gather(2, chosen), torch.arange(slots, device=device) < now.unsqueeze(2)
    return lost_at, loser, kept, here.sum(dim=2)


def _outcome(at: Tensor, valid: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """From when each token is lost: the token lost at each arrival, those that stay, and how many those are."""
    tokens, count, number = at.shape[2], at.shape[2] - slots, torch.arange(at.shape[2], device=at.device)
    # the last column takes what is not lost
    out = torch.full((*at.shape[:2], count + 1), tokens, dtype=torch.long, device=at.device)
    gone = out.scatter_(2, at, number.expand_as(at))[:, :, :-1]
    stays = valid & (at == count)
    total = stays.sum(dim=2)
    place = torch.where(stays, stays.cumsum(dim=2) - 1, total.unsqueeze(2) + (~stays).cumsum(dim=2) - 1)
    chosen = torch.empty_like(at).scatter_(2, place, number.expand_as(at))[:, :, :slots]
    return gone, chosen, total


def _lost(priority: Tensor, rank: Tensor, valid: Tensor, slots: int) -> Tensor:
    """At which arrival each of a few tokens is lost, the first ``slots`` being there before.

    The number of arrivals if it is not. A token is lost once as many tokens as there are slots are better than it.
    """
    count = priority.shape[2] - slots
    number = torch.arange(priority.shape[2], device=priority.device)
    mine, other = priority.unsqueeze(3), priority.unsqueeze(2)
    older = rank.unsqueeze(2) < rank.unsqueeze(3)
    better = valid.unsqueeze(2) & ((other > mine) | ((other == mine) & older))
    total = better[..., :slots].sum(dim=3, keepdim=True, dtype=torch.int32) + better[..., slots:].cumsum(
        dim=3, dtype=torch.int32
    )
    first = (total < slots).sum(dim=3)
    at = torch.maximum(first, (number - slots).clamp(min=0))  # not before it is there
    return torch.where(valid, at, count)


def _one_more(priority: Tensor, rank: Tensor, filled: Tensor, where: Tensor) -> Chosen:
    """``running_top`` of a single arrival: the least of all is lost if there is no room, the youngest of equal ones."""
    slots = priority.shape[2] - 1
    number = torch.arange(slots + 1, device=priority.device)
    there = (number < filled.unsqueeze(2)) | ((number == slots) & where.unsqueeze(2))
    value = torch.where(there, priority, float("inf"))
    least = there & (value == value.amin(dim=2, keepdim=True))
    least = torch.where(least, rank, -1).argmax(dim=2)
    lost = where & (filled == slots)
    lost_at = 1 - (lost.unsqueeze(2) & (number == least.unsqueeze(2))).long()
    slot, comes = number[:slots], where & ~lost
    kept = slot + (lost.unsqueeze(2) & (slot >= least.unsqueeze(2)))
    kept = torch.where(comes.unsqueeze(2) & (slot == filled.unsqueeze(2)), slots, kept)
    return lost_at, torch.where(lost, least, slots + 1).unsqueeze(2), kept, filled + comes
