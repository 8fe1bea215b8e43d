"""A Triton kernel that finds when each token is lost from the slots: every token compared with every other one."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import operator


@triton.jit
def _better(priority_ptr, rank_ptr, valid_ptr, mine, rank, n, tokens):
    """Which of the tokens ``n`` are kept rather than mine."""
    there = n < tokens
    other = tl.load(priority_ptr + n, mask=there, other=float("-inf"))[None, :]
    age = tl.load(rank_ptr + n, mask=there, other=0).to(tl.int32)[None, :]
    valid = tl.load(valid_ptr + n, mask=there, other=0)[None, :] != 0
    above = (other > mine[:, None]) | ((other == mine[:, None]) & (age < rank[:, None]))
    return (above & valid).to(tl.int32)


@Kernel
@triton.jit
def _lost(
    priority_ptr, rank_ptr, valid_ptr, at_ptr, tokens, slots, count,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Arrivals go by in spans of ``TILES`` blocks; only where a token is lost within one, they are counted singly."""
    row, number = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    priority_ptr += row * tokens
    rank_ptr += row * tokens
    valid_ptr += row * tokens
    here, column = number < tokens, tl.arange(0, BLOCK)
    mine = tl.load(priority_ptr + number, mask=here, other=float("inf"))
    rank = tl.load(rank_ptr + number, mask=here, other=0).to(tl.int32)
    there = tl.load(valid_ptr + number, mask=here, other=0) != 0
    counted = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, slots, BLOCK):
        counted += _better(priority_ptr, rank_ptr, valid_ptr, mine, rank, start + column, slots)
    total = tl.sum(counted, 1)
    first = tl.zeros((ROWS,), tl.int32)
    for start in range(slots, tokens, BLOCK * TILES):
        if tl.min(tl.where(there, total, slots), 0) < slots:  # else all of them are lost by now
            stop = tl.minimum(start + BLOCK * TILES, tokens)
            counted = tl.zeros((ROWS, BLOCK), tl.int32)
            for at in range(start, stop, BLOCK):
                counted += _better(priority_ptr, rank_ptr, valid_ptr, mine, rank, at + column, tokens)
            now = total + tl.sum(counted, 1)
            if tl.max(tl.where(there & (total < slots) & (now >= slots), 1, 0), 0) > 0:  # one is lost here
                before = total
                for at in range(start, stop, BLOCK):
                    better = _better(priority_ptr, rank_ptr, valid_ptr, mine, rank, at + column, tokens)
                    kept = (before[:, None] + tl.cumsum(better, 1)) < slots
                    first += tl.sum((kept & (at + column < stop)[None, :]).to(tl.int32), 1)
                    before += tl.sum(better, 1)
            else:
                first += tl.where(now < slots, stop - start, 0)
            total = now
    at = tl.where(there, tl.maximum(first, number - slots), count)
    tl.store(at_ptr + row * tokens + number, at.to(tl.int64), mask=here)


@operator("ahn_layers::lost")
def lost(priority: Tensor, rank: Tensor, valid: Tensor, slots: int) -> Tensor:
    """At which arrival each token is lost; the number of arrivals if it is not.

    Args:
        priority: ``(B, G, N)`` float32; the first ``slots`` are there before.
        rank: ``(B, G, N)`` int64: of equal ones the lower one stays.
        valid: False where there is no token, ``(B, G, N)``.
        slots: how many are kept.
    """
    priority, rank, valid = (u.contiguous() for u in (priority, rank, valid))
    b, groups, tokens = priority.shape
    at = torch.empty(priority.shape, dtype=torch.long, device=priority.device)
    _lost[(triton.cdiv(tokens, 64), b * groups)](
        priority, rank, valid, at, tokens, slots, tokens - slots, ROWS=64, BLOCK=64, TILES=8, num_warps=4
    )
    return at


@lost.register_fake
def _(priority: Tensor, rank: Tensor, valid: Tensor, slots: int) -> Tensor:
    return torch.empty(priority.shape, dtype=torch.long, device=priority.device)
