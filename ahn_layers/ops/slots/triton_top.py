"""A Triton kernel that finds when each token is lost from the slots: every token compared with every other one."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_forms import on_its_gpu


@triton.jit
def _better(priority_ptr, valid_ptr, mine, number, n, tokens):
    """Which of the tokens ``n`` are kept rather than mine."""
    there = n < tokens
    other = tl.load(priority_ptr + n, mask=there, other=float("-inf"))
    valid = tl.load(valid_ptr + n, mask=there, other=0) != 0
    above = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & (n[None, :] < number[:, None]))
    return (above & valid[None, :]).to(tl.int32)


@triton.jit
def _lost(
    priority_ptr, valid_ptr, at_ptr, tokens, slots, count, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, number = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    priority_ptr += row * tokens
    valid_ptr += row * tokens
    here = number < tokens
    mine = tl.load(priority_ptr + number, mask=here, other=float("inf"))
    there = tl.load(valid_ptr + number, mask=here, other=0) != 0
    total = tl.zeros((ROWS,), tl.int32)
    for start in range(0, slots, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.sum(_better(priority_ptr, valid_ptr, mine, number, n, tl.minimum(slots, tokens)), 1)
    first = tl.zeros((ROWS,), tl.int32)
    for start in range(slots, tokens, BLOCK):
        if tl.min(tl.where(there, total, slots), 0) < slots:  # else all of them are lost by now
            better = _better(priority_ptr, valid_ptr, mine, number, start + tl.arange(0, BLOCK), tokens)
            now = total + tl.sum(better, 1)
            size = tl.minimum(BLOCK, tokens - start)
            if tl.max(tl.where((total < slots) & (now >= slots), 1, 0), 0) > 0:  # one is lost here
                before = ((total[:, None] + tl.cumsum(better, 1)) < slots).to(tl.int32)
                inside = (tl.arange(0, BLOCK) < size)[None, :]
                first += tl.sum(tl.where(inside, before, 0), 1)
            else:
                first += tl.where(now < slots, size, 0)
            total = now
    at = tl.where(there, tl.maximum(first, number - slots), count)
    tl.store(at_ptr + row * tokens + number, at.to(tl.int64), mask=here)


@torch.library.custom_op("ahn_layers::lost", mutates_args=())
@on_its_gpu
def lost(priority: Tensor, valid: Tensor, slots: int) -> Tensor:
    """At which arrival each token is lost; the number of arrivals if it is not.

    Args:
        priority: ``(B, G, N)`` float32; the first ``slots`` are there before.
        valid: False where there is no token, ``(B, G, N)``.
        slots: how many are kept.
    """
    priority, valid = priority.contiguous(), valid.contiguous()
    b, groups, tokens = priority.shape
    at = torch.empty(priority.shape, dtype=torch.long, device=priority.device)
    _lost[(triton.cdiv(tokens, 64), b * groups)](
        priority, valid, at, tokens, slots, tokens - slots, ROWS=64, BLOCK=64, num_warps=4
    )
    return at


@lost.register_fake
def _(priority: Tensor, valid: Tensor, slots: int) -> Tensor:
    return torch.empty(priority.shape, dtype=torch.long, device=priority.device)
