"""A Triton kernel that turns rotary queries back, in one pass over them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import operator

_ROWS = 32


@Kernel
@triton.jit(do_not_specialize=["rows", "heads", "length"])
def _turn(
    q_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, length, q_b, q_h, q_t, angle_b, first, pairs,
    INTERLEAVED: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PAIRS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PAIRS)
    b, t = row // (heads * length), row % length
    base = (b * q_b + row // length % heads * q_h + t * q_t)[:, None]
    here = row[:, None] < rows
    inside = here & (pair[None, :] < pairs)
    leads = first + (2 * pair if INTERLEAVED else pair)
    follows = leads + (1 if INTERLEAVED else pairs)
    u = tl.load(q_ptr + base + leads[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(q_ptr + base + follows[None, :], mask=inside, other=0.0).to(tl.float32)
    at = (b * angle_b + t * pairs)[:, None] + pair[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    out_ptr += row[:, None] * SIZE
    tl.store(out_ptr + leads[None, :], (u * cos + v * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + follows[None, :], (v * cos - u * sin).to(out_ptr.dtype.element_ty), mask=inside)
    if not WHOLE:  # channels that are not rotated
        c = tl.arange(0, PAD)
        rest = here & ((c < first) | ((c >= first + 2 * pairs) & (c < SIZE)))[None, :]
        tl.store(out_ptr + c[None, :], tl.load(q_ptr + base + c[None, :], mask=rest, other=0.0), mask=rest)


@operator("ahn_layers::turn")
def turn(q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, start: int) -> Tensor:
    """The rotation by ``-angle``; see ``rotary.turn_back``.

    Args:
        q: ``(B, H, T, D)``.
        cos: ``(T, R)``, or ``(B, T, R)``, float32.
        sin: likewise.
        interleaved: how channels are paired.
        start: first rotated channel.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out, (_, heads, length, size) = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.shape
    rows, pairs = q.shape[:3].numel(), cos.shape[-1]
    _turn[(triton.cdiv(rows, _ROWS),)](
        q, cos, sin, out, rows, heads, length, *q.stride()[:3], cos.stride(0) if cos.ndim == 3 else 0, start,
        pairs, INTERLEAVED=interleaved, SIZE=size, PAD=triton.next_power_of_2(size),
        PAIRS=triton.next_power_of_2(pairs), WHOLE=2 * pairs == size, BLOCK=_ROWS, num_warps=4,
    )  # fmt: skip
    return out


turn.register_fake(lambda q, cos, sin, interleaved, start: q.new_empty(q.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.start = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return turn(grad, cos, -sin, ctx.interleaved, ctx.start), None, None, None, None


turn.register_autograd(_backward, setup_context=_save)
