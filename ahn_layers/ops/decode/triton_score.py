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
    """Of the scores of one row in all heads, what some hidden units contribute; the last part is the direct term.

    See ``LearnedScore``. The parts are added up by the second launch.
    """
    i, e = part * UNITS + tl.arange(0, UNITS), tl.arange(0, E_PAD)
    hidden = part < PARTS - 1
    here = i < tl.where(hidden, INNER, 0)
    total, squares = tl.zeros((UNITS, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        at = i[:, None] * N + n[None, :]
        weight = tl.load(up_ptr + at, mask=here[:, None] & (n[None, :] < N), other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += weight * x[None, :]
        squares += x * x
    x_scale = tl.rsqrt(tl.sum(squares, 0) / N + eps)
    up = tl.sum(total, 1) * x_scale + tl.load(up_bias_ptr + i, mask=here, other=0.0).to(tl.float32)
    weight = tl.load(up_v_ptr + i[:, None] * E + e[None, :], mask=here[:, None] & (e[None, :] < E), other=0.0)
    for g in range(G):
        if hidden:
            v = tl.load(v_ptr + b * v_b + g * v_g + e, mask=e < E, other=0.0).to(tl.float32)
            inner = up + tl.sum(weight.to(tl.float32) * v[None, :], 1) * tl.rsqrt(tl.sum(v * v, 0) / E + eps)
            down = tl.load(down_ptr + g * INNER + i, mask=here, other=0.0).to(tl.float32)
            score = tl.sum(down * inner / (1 + tl.exp(-inner)), 0)
        else:
            product = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, N, BLOCK):
                n = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
                product += tl.load(direct_ptr + g * N + n, mask=n < N, other=0.0).to(tl.float32) * x
            score = tl.sum(product, 0) * x_scale + tl.load(direct_bias_ptr + g).to(tl.float32)
        tl.store(out_ptr + (b * G + g) * PARTS + part, score)
