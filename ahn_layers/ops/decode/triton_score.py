"""What the kernels of a decode step do for a learned score: that of the new token, while others attend."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def _score_part(
    x_ptr, v_ptr, up_ptr, up_bias_ptr, up_v_ptr, down_ptr, direct_ptr, direct_bias_ptr, out_ptr, b, part, eps,
    v_b, v_g, G: tl.constexpr, N: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, INNER: tl.constexpr,
    UNITS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the scores of one row in all heads, what some hidden units contribute, or the direct term of some heads.

    See ``LearnedScore``. A score has ``PARTS`` summands, the direct term is the last; the second launch adds them up.
    """
    hidden = part < PARTS - 1
    i, e = tl.where(hidden, part, part - (PARTS - 1)) * UNITS + tl.arange(0, UNITS), tl.arange(0, E_PAD)
    here, weight_ptr, bias_ptr = i < INNER, up_ptr, up_bias_ptr
    if not hidden:
        here, weight_ptr, bias_ptr = i < G, direct_ptr, direct_bias_ptr
    bias = tl.load(bias_ptr + i, mask=here, other=0.0).to(tl.float32)
    weight_v = tl.load(up_v_ptr + i[:, None] * E + e[None, :], mask=(i[:, None] < INNER) & (e[None, :] < E), other=0.0)
    total, squares = tl.zeros((UNITS, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=1):
        n = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + i[:, None] * N + n[None, :], mask=here[:, None] & (n[None, :] < N), other=0.0)
        x = tl.load(x_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * x[None, :]
        squares += x * x
    up = tl.sum(total, 1) * tl.rsqrt(tl.sum(squares, 0) / N + eps) + bias
    out_ptr += b * G * PARTS
    if hidden:
        for g in range(G):
            v = tl.load(v_ptr + b * v_b + g * v_g + e, mask=e < E, other=0.0).to(tl.float32)
            down = tl.load(down_ptr + g * INNER + i, mask=here, other=0.0).to(tl.float32)
            inner = up + tl.sum(weight_v.to(tl.float32) * v[None, :], 1) * tl.rsqrt(tl.sum(v * v, 0) / E + eps)
            tl.store(out_ptr + g * PARTS + part, tl.sum(down * inner / (1 + tl.exp(-inner)), 0))
    else:
        tl.store(out_ptr + i * PARTS + (PARTS - 1), up, mask=here)
