"""A Triton kernel that joins attention over several sets of keys into attention over all of them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import on_its_gpu

_ROWS = 32
MOST = 4
"""Parts that can be joined."""


@triton.jit
def _lse(ptr, b, h, t, heads, length, mask):
    return tl.load(ptr + (b * heads + h) * length + t, mask=mask, other=0.0)


@triton.jit
def _add(out, ptr, lse_ptr, b, t, h, e, s_b, s_t, s_h, heads, length, lse, inside, rows):
    weight = tl.exp(_lse(lse_ptr, b, h, t, heads, length, rows) - lse)
    part = tl.load(ptr + (b * s_b + t * s_t + h * s_h)[:, None] + e[None, :], mask=inside, other=0.0)
    return out + part.to(tl.float32) * weight[:, None]


@Kernel
@triton.jit(do_not_specialize=["rows", "heads", "length"])
def _join(
    a_ptr, b_ptr, c_ptr, d_ptr, a_lse, b_lse, c_lse, d_lse, out_ptr, lse_ptr, rows, heads, length,
    a_b, a_t, a_h, b_b, b_t, b_h, c_b, c_t, c_h, d_b, d_t, d_h,
    N: tl.constexpr, BACKWARDS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PAD)
    here, b, t, h = row < rows, row // (heads * length), row // heads % length, row % heads
    inside = here[:, None] & (e[None, :] < SIZE)
    last = length - 1
    first = _lse(a_lse, b, h, last - t if BACKWARDS == 0 else t, heads, length, here)
    second = _lse(b_lse, b, h, last - t if BACKWARDS == 1 else t, heads, length, here)
    largest = tl.maximum(first, second)
    third, fourth = first, first
    if N > 2:
        third = _lse(c_lse, b, h, last - t if BACKWARDS == 2 else t, heads, length, here)
        largest = tl.maximum(largest, third)
    if N > 3:
        fourth = _lse(d_lse, b, h, last - t if BACKWARDS == 3 else t, heads, length, here)
        largest = tl.maximum(largest, fourth)
    total = tl.exp(first - largest) + tl.exp(second - largest)
    if N > 2:
        total += tl.exp(third - largest)
    if N > 3:
        total += tl.exp(fourth - largest)
    lse = largest + tl.log(total)
    out = tl.zeros((BLOCK, PAD), tl.float32)
    at = last - t if BACKWARDS == 0 else t
    out = _add(out, a_ptr, a_lse, b, at, h, e, a_b, a_t, a_h, heads, length, lse, inside, here)
    at = last - t if BACKWARDS == 1 else t
    out = _add(out, b_ptr, b_lse, b, at, h, e, b_b, b_t, b_h, heads, length, lse, inside, here)
    if N > 2:
        at = last - t if BACKWARDS == 2 else t
        out = _add(out, c_ptr, c_lse, b, at, h, e, c_b, c_t, c_h, heads, length, lse, inside, here)
    if N > 3:
        at = last - t if BACKWARDS == 3 else t
        out = _add(out, d_ptr, d_lse, b, at, h, e, d_b, d_t, d_h, heads, length, lse, inside, here)
    tl.store(out_ptr + row[:, None] * SIZE + e[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (b * heads + h) * length + t, lse, mask=here)


@on_its_gpu
def join(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], backwards: int | None) -> tuple[Tensor, Tensor]:
    """See ``join.join``: two to four parts, the last dimension contiguous.

    Args:
        outs: ``(B, T, H, E)`` each.
        lses: log-sum-exps, ``(B, H, T)`` float32 each.
        backwards: the part whose tokens come in reverse order, None for no part.
    """
    batch, length, heads, size = outs[0].shape
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(lses[0].shape, dtype=torch.float32, device=out.device)
    count = len(outs)
    outs, lses = ((*u, *[u[0]] * (MOST - count)) for u in (outs, lses))
    rows = batch * length * heads
    _join[(triton.cdiv(rows, _ROWS),)](
        *outs, *(u.contiguous() for u in lses), out, lse, rows, heads, length,
        *(s for u in outs for s in u.stride()[:3]),
        N=count, BACKWARDS=-1 if backwards is None else backwards, SIZE=size, PAD=triton.next_power_of_2(size),
        BLOCK=_ROWS, num_warps=4,
    )  # fmt: skip
    return out, lse
