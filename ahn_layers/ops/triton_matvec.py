"""Several matrices times one vector in one launch: what a decode step of a single row is made of.

Such a product takes as long as its matrix takes to be read. A library's matrix product is made for more columns: it
leaves much of the bandwidth unused, most of all where the matrix is small.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 8
"""Matrices in one launch."""
_ROWS, _WARPS = 2, 4


@triton.jit
def _matvec(
    x_ptr, add_ptr, out_ptr,
    w0, w1, w2, w3, w4, w5, w6, w7, b0, b1, b2, b3, b4, b5, b6, b7,
    e0, e1, e2, e3, e4, e5, e6, e7, n0, n1, n2, n3, n4, n5, n6, n7,
    K: tl.constexpr, COUNT: tl.constexpr, BIASED: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Matrix i has ``n_i`` rows and the programs from ``e_{i-1}`` to ``e_i``."""
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
    for first in tl.static_range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        part = tl.load(
            w + n[:, None].to(tl.int64) * K + k[None, :], mask=(n[:, None] < rows) & (k[None, :] < K), other=0.0
        )
        total += part.to(tl.float32) * tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if BIASED:
        y += tl.load(bias + n, mask=(n < rows) & (biased > 0), other=0.0).to(tl.float32)
    if ADDS:  # to a sum that is rounded once more, as if it were added afterwards
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(add_ptr + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < rows)


@torch.library.custom_op("ahn_layers::matvec", mutates_args=())
def matvec(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], add: Tensor | None = None) -> Tensor:
    """``W x + b`` for every matrix, one after the other in one vector, summed in float32.

    Args:
        x: one row, ``(..., K)``.
        weights: ``(N_i, K)`` each, contiguous, at most ``MOST``.
        biases: ``(N_i,)`` each, or None.
        add: what the result of the only matrix is added to, of the same number of elements.
    """
    x, count = x.contiguous(), len(weights)
    assert all(w.is_contiguous() for w in weights)
    rows = [w.shape[0] for w in weights]
    block = 2048 if sum(rows) >= 8192 else 1024  # of the columns; small matrices need many short loads at once
    out = x.new_empty(sum(rows))
    ends = [sum(triton.cdiv(n, _ROWS) for n in rows[: i + 1]) for i in range(count)]
    spare = MOST - count
    _matvec[(ends[-1],)](
        x, x if add is None else add.contiguous(), out, *weights, *weights[:1] * spare,
        *[x if b is None else b for b in biases], *[x] * spare,
        *ends, *ends[-1:] * spare, *rows, *rows[:1] * spare, K=x.shape[-1], COUNT=count,
        BIASED=sum(1 << i for i, b in enumerate(biases) if b is not None), ADDS=add is not None, ROWS=_ROWS,
        BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip
    return out


@matvec.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], add: Tensor | None = None) -> Tensor:
    return x.new_empty(sum(w.shape[0] for w in weights))
