"""Running top-k: keeps the tokens with the highest priorities, separately for each key/value head.

Dimensions: b batch, g key/value heads, e slots, n arrivals.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..triton_forms import in_triton

_CHUNK = {"cpu": 128}
"""Arrivals compared with each other at once, by device type."""
_LARGE_CHUNK = 512
"""On any other device, where launches cost more than comparisons."""

Chosen = tuple[Int[Tensor, "b g e+n"], Int[Tensor, "b g n"], Int[Tensor, "b g e"], Int[Tensor, "b g"]]


def running_top(
    held: Float[Tensor, "b g e"],
    filled: Int[Tensor, "b g"],
    arriving: Float[Tensor, "b g n"],
    where: Bool[Tensor, "b g n"],
) -> Chosen:
    """After every arrival the ``e`` tokens of highest priority are kept and the one that is then too many is lost.

    Priorities do not change, so it does not matter how the arrivals are cut into calls. Among equal ones the older
    token stays.

    Args:
        held: priorities in the slots, in the order in which they came.
        filled: how many slots are.
        arriving: priorities of the arrivals.
        where: False where none arrives.

    Returns:
        Tokens are numbered: the slots, then the arrivals. For each token the arrival that it is lost at (``n`` if it
        is not); the token that is lost at each arrival (``e + n`` if none is); the tokens in the slots afterwards, in
        the order in which they came; and how many slots are filled.
    """
    slots, count, device = held.shape[2], arriving.shape[2], held.device
    priority = torch.cat((held, arriving), dim=2)
    priority = torch.where(priority.isnan(), float("-inf"), priority)
    if count == 1:
        return _one_more(priority, filled, where.squeeze(2))
    here = torch.arange(slots, device=device) < filled.unsqueeze(2)
    kept = torch.arange(slots, device=device).expand_as(here)
    lost_at = torch.full_like(priority, count, dtype=torch.long)
    loser = torch.full_like(arriving, slots + count, dtype=torch.long)
    kernel = in_triton(priority) and priority.dtype != torch.float64
    size = count if kernel else _CHUNK.get(device.type, _LARGE_CHUNK)
    for start in range(0, count, size):
        stop = min(start + size, count)
        index = torch.cat(
            (kept, torch.arange(slots + start, slots + stop, device=device).expand(*kept.shape[:2], -1)), 2
        )
        valid = torch.cat((here, where[:, :, start:stop]), dim=2)
        at = (_lost_in_kernel if kernel else _lost)(priority.gather(2, index), valid, slots)  # within the chunk
        stays = valid & (at == stop - start)
        lost_at.scatter_(2, index, torch.where(at < stop - start, at + start, lost_at.gather(2, index)))
        # the last column takes what is not lost
        out = torch.full((*at.shape[:2], stop - start + 1), slots + count, dtype=torch.long, device=device)
        loser[:, :, start:stop] = out.scatter_(2, at, index)[:, :, :-1]
        order = (~stays).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :slots]
        kept, here = index.gather(2, order), stays.gather(2, order)
    return lost_at, loser, kept, here.sum(dim=2)


def _lost(priority: Tensor, valid: Tensor, slots: int) -> Tensor:
    """At which arrival each of a few tokens is lost, the first ``slots`` being there before.

    The number of arrivals if it is not. A token is lost once as many tokens as there are slots are better than it.
    """
    count = priority.shape[2] - slots
    number = torch.arange(priority.shape[2], device=priority.device)
    mine, other = priority.unsqueeze(3), priority.unsqueeze(2)
    better = valid.unsqueeze(2) & ((other > mine) | ((other == mine) & (number < number.unsqueeze(1))))
    total = better[..., :slots].sum(dim=3, keepdim=True, dtype=torch.int32) + better[..., slots:].cumsum(
        dim=3, dtype=torch.int32
    )
    first = (total < slots).sum(dim=3)
    at = torch.maximum(first, (number - slots).clamp(min=0))  # not before it is there
    return torch.where(valid, at, count)


def _lost_in_kernel(priority: Tensor, valid: Tensor, slots: int) -> Tensor:
    """The same for any number of tokens."""
    from . import triton_top

    return triton_top.lost(priority, valid, slots)


def _one_more(priority: Tensor, filled: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``running_top`` of a single arrival: the least of all is lost if there is no room, the youngest of equal ones."""
    slots = priority.shape[2] - 1
    number = torch.arange(slots + 1, device=priority.device)
    there = (number < filled.unsqueeze(2)) | ((number == slots) & where.unsqueeze(2))
    value = torch.where(there, priority, float("inf"))
    least = there & (value == value.amin(dim=2, keepdim=True))
    least = torch.where(least, number, -1).amax(dim=2)
    lost = where & (filled == slots)
    lost_at = 1 - (lost.unsqueeze(2) & (number == least.unsqueeze(2))).long()
    slot, comes = number[:slots], where & ~lost
    kept = slot + (lost.unsqueeze(2) & (slot >= least.unsqueeze(2)))
    kept = torch.where(comes.unsqueeze(2) & (slot == filled.unsqueeze(2)), slots, kept)
    return lost_at, torch.where(lost, least, slots + 1).unsqueeze(2), kept, filled + comes
