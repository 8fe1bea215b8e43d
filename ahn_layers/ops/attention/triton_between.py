"""A Triton kernel for attention to keys that are seen for a while, in every key/value head its own.

As FlashAttention (arXiv 2307.08691), forward only. Queries go in chunks; for each one the keys that any of its queries
sees are listed, so that those which are gone, or have yet to come, cost nothing.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import operator

CHUNK = 256
"""Queries for which keys are listed together."""
_LEAST = tl.constexpr(-1e30)
"""Instead of the largest logit where there is none: minus infinity has no difference from itself."""
_LOG2E = tl.constexpr(1.4426950408889634)


@Kernel
@triton.jit(do_not_specialize=["length", "keys", "chunks", "most"])
def _attend(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, index_ptr, count_ptr, out_ptr, lse_ptr,
    length, keys, chunks, most, scale, q_b, q_h, q_t, k_b, k_g, k_c, v_b, v_g, v_c, f_b, f_g, l_b, l_g,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    g = h // R
    t, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, D_PAD)
    inside = (t[:, None] < length) & (d[None, :] < D)
    q = tl.load(q_ptr + b * q_b + h * q_h + t[:, None].to(tl.int64) * q_t + d[None, :], mask=inside, other=0.0)
    row = (b * (H // R) + g) * chunks + tile * ROWS // SIZE
    count = tl.load(count_ptr + row)
    index_ptr += row * most
    largest = tl.full((ROWS,), _LEAST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, D_PAD), tl.float32)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        here = n < count
        c = tl.load(index_ptr + n, mask=here, other=0).to(tl.int64)
        first = tl.load(first_ptr + b * f_b + g * f_g + c, mask=here, other=0)
        last = tl.load(last_ptr + b * l_b + g * l_g + c, mask=here, other=0)
        k = tl.load(
            k_ptr + b * k_b + g * k_g + c[None, :] * k_c + d[:, None], mask=here[None, :] & (d[:, None] < D), other=0.0
        )
        v = tl.load(
            v_ptr + b * v_b + g * v_g + c[:, None] * v_c + d[None, :], mask=here[:, None] & (d[None, :] < D), other=0.0
        )
        logits = tl.dot(q, k) * (scale * _LOG2E)
        seen = (first[None, :] <= t[:, None]) & (t[:, None] < last[None, :])
        logits = tl.where(seen, logits, float("-inf"))
        now = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp2(logits - now[:, None])
        fade = tl.exp2(largest - now)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * fade + tl.sum(p, 1)
        largest = now
    none = total == 0
    out = out / tl.where(none, 1.0, total)[:, None]
    lse = tl.where(none, float("-inf"), (largest + tl.log2(tl.where(none, 1.0, total))) / _LOG2E)
    tl.store(lse_ptr + head.to(tl.int64) * length + t, lse, mask=t < length)
    out_ptr += ((b * length + t[:, None]) * H + h) * D + d[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=inside)


@operator("ahn_layers::attend_between")
def attend(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, index: Tensor, count: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Query ``i`` sees the keys with ``first <= i < last``.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, C, D)``.
        v: ``(B, G, C, D)``.
        first: ``(B, G, C)`` int64.
        last: likewise.
        index: for each ``CHUNK`` queries the keys that matter, ``(B, G, chunks, most)`` int32.
        count: how many those are, ``(B, G, chunks)`` int32.
        scale: logit factor.

    Returns:
        The attention, ``(B, T, H, D)``, zero where nothing is seen, and its log-sum-exp ``(B, H, T)`` float32.
    """
    q, k, v, first, last = (u if u.stride(-1) == 1 else u.contiguous() for u in (q, k, v, first, last))
    index, count = index.contiguous(), count.contiguous()
    b, h, length, d = q.shape
    out, lse = q.new_empty(b, length, h, d), q.new_empty(b, h, length, dtype=torch.float32)
    pad = max(16, triton.next_power_of_2(d))
    rows = 128 if pad <= 128 and q.element_size() == 2 else 64
    _attend[(triton.cdiv(length, rows), b * h)](
        q, k, v, first, last, index, count, out, lse, length, k.shape[2], index.shape[2], index.shape[3], scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *first.stride()[:2], *last.stride()[:2],
        H=h, R=h // k.shape[1], D=d, D_PAD=pad, SIZE=CHUNK, ROWS=rows, BLOCK=64, num_warps=8 if pad > 64 else 4,
        num_stages=2,
    )  # fmt: skip
    return out, lse


@attend.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, h, length, d = q.shape
    return q.new_empty(b, length, h, d), q.new_empty(b, h, length, dtype=torch.float32)
