"""Several matrices times one vector in one launch: what a decode step of a single row is made of.

Such a product takes as long as its matrix takes to be read. A library's matrix product is made for more columns: it
leaves much of the bandwidth unused, most of all where the matrix is small. What stands around the product in a decoder
layer is done on the way: the RMS norm of the vector, the gate of an MLP, the sum with the residual.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl
from torch import Tensor

from ...ops.ahead import Kernel
from ...ops.triton_forms import early_launch, operator

MOST = 8
"""Matrices in one launch."""
_ROWS, _COLUMNS, _WARPS = 2, 1024, 4
"""What a program loads at a time, and its warps: the fastest of those tried for matrices of 2,048 to 11,008 columns."""


@Kernel
@triton.jit
def _matvec(
    x_ptr, norm_ptr, add_ptr, out_ptr, row_ptr,
    w0, w1, w2, w3, w4, w5, w6, w7, b0, b1, b2, b3, b4, b5, b6, b7,
    e0, e1, e2, e3, e4, e5, e6, e7, n0, n1, n2, n3, n4, n5, n6, n7, eps,
    K: tl.constexpr, COUNT: tl.constexpr, BIASED: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr,
    ADDS: tl.constexpr, KEEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Matrix i has ``n_i`` rows and the programs from ``e_{i-1}`` to ``e_i``; if ``GATED``, 0 and 1 have the same.

    If ``KEEPS``, those after the last matrix store the normed row.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    w, bias, rows, before, biased = w0, b0, n0, 0, BIASED % 2
    if COUNT > 1:
        if program >= e0:
            w, bias, rows, before, biased, out_ptr = w1, b1, n1, e0, BIASED // 2 % 2, out_ptr + n0
    if COUNT > 2:
        if program >= e1:
            w, bias, rows, before, biased, out_ptr = w2, b2, n2, e1, BIASED // 4 % 2, out_ptr + n1
    if COUNT > 3:
        if program >= e2:
            w, bias, rows, before, biased, out_ptr = w3, b3, n3, e2, BIASED // 8 % 2, out_ptr + n2
    if COUNT > 4:
        if program >= e3:
            w, bias, rows, before, biased, out_ptr = w4, b4, n4, e3, BIASED // 16 % 2, out_ptr + n3
    if COUNT > 5:
        if program >= e4:
            w, bias, rows, before, biased, out_ptr = w5, b5, n5, e4, BIASED // 32 % 2, out_ptr + n4
    if COUNT > 6:
        if program >= e5:
            w, bias, rows, before, biased, out_ptr = w6, b6, n6, e5, BIASED // 64 % 2, out_ptr + n5
    if COUNT > 7:
        if program >= e6:
            w, bias, rows, before, biased, out_ptr = w7, b7, n7, e6, BIASED // 128 % 2, out_ptr + n6
    n = (program - before) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    other = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in tl.static_range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        at, inside = n[:, None].to(tl.int64) * K + k[None, :], (n[:, None] < rows) & (k[None, :] < K)
        part = tl.load(w + at, mask=inside, other=0.0)
        if GATED:
            other_part = tl.load(w1 + at, mask=inside, other=0.0)
        if EARLY and first == 0:
            tl.extra.cuda.gdc_wait()  # for the kernel before this one; nothing but matrices is read before
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total += part.to(tl.float32) * x[None, :]
        if GATED:
            other += other_part.to(tl.float32) * x[None, :]
    y, z = tl.sum(total, 1), tl.sum(other, 1)
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y, z = y * scale, z * scale
    if BIASED:
        y += tl.load(bias + n, mask=(n < rows) & (biased > 0), other=0.0).to(tl.float32)
    if GATED:
        if BIASED // 2 % 2:
            z += tl.load(b1 + n, mask=n < rows, other=0.0).to(tl.float32)
        y = y / (1 + tl.exp(-y)) * z
    if ADDS:  # to a sum that is rounded once more, as if it were added afterwards
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(add_ptr + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < rows)
    if KEEPS:
        if program >= e7:
            k = (program - e7) * BLOCK + tl.arange(0, BLOCK)
            row = (tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32) * scale).to(row_ptr.dtype.element_ty)
            tl.store(row_ptr + k, row * tl.load(norm_ptr + k, mask=k < K, other=0.0), mask=k < K)


@operator("ahn_layers::matvec")
def matvec(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add: Tensor | None = None,
    keeps: bool = False,
) -> Tensor:
    """``W x + b`` for every matrix, one after the other in one vector, summed in float32.

    The kernel before this one must not write to the matrices, which are read while it ends.

    Args:
        x: one row, ``(..., K)``.
        weights: ``(N_i, K)`` each, contiguous, at most ``MOST``.
        biases: ``(N_i,)`` each, or None.
        norm: ``(K,)``: ``norm * x / sqrt(mean(x^2) + eps)`` takes the place of ``x``; None for ``x`` itself.
        eps: see ``norm``.
        gated: ``silu(W_0 x + b_0) * (W_1 x + b_1)`` of two matrices of one shape.
        add: what the result of the only matrix is added to, of the same number of elements.
        keeps: whether the normed ``x`` itself comes after the products; not together with ``gated`` or ``add``.
    """
    x, count = x.contiguous(), len(weights)
    assert all(w.is_contiguous() for w in weights)
    rows = [w.shape[0] for w in weights]
    width, height = x.shape[-1], _ROWS // 2 if gated else _ROWS
    out = x.new_empty((rows[0] if gated else sum(rows)) + keeps * width)
    ends = [sum(triton.cdiv(n, height) for n in rows[: i + 1]) for i in range(count)]
    spare = MOST - count
    _matvec[(ends[0 if gated else -1] + keeps * triton.cdiv(width, _COLUMNS),)](
        x, x if norm is None else norm, x if add is None else add.contiguous(), out, out[-width:],
        *weights, *weights[:1] * spare, *[x if b is None else b for b in biases], *[x] * spare,
        *ends, *ends[-1:] * spare, *rows, *rows[:1] * spare, eps, K=width, COUNT=1 if gated else count,
        BIASED=sum(1 << i for i, b in enumerate(biases) if b is not None), NORMED=norm is not None, GATED=gated,
        ADDS=add is not None, KEEPS=keeps, ROWS=height, BLOCK=_COLUMNS, num_warps=_WARPS, **early_launch(x),
    )  # fmt: skip
    return out


@matvec.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: object, norm: object, eps: float, gated: bool, add: object = None,
    keeps: bool = False,
) -> Tensor:  # fmt: skip
    rows = [w.shape[0] for w in weights]
    return x.new_empty((rows[0] if gated else sum(rows)) + keeps * x.shape[-1])
