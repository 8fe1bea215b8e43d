"""A Triton kernel for the learned score of one token in each row: all of it but the products with the hidden state."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_forms import on_its_gpu


@triton.jit
def _score(
    x_ptr, v_ptr, up_ptr, direct_ptr, up_bias_ptr, direct_bias_ptr, up_v_ptr, down_ptr, out_ptr, eps, v_b, v_g,
    G: tl.constexpr, N: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    square = tl.zeros((N_BLOCK,), tl.float32)
    for start in range(0, N, N_BLOCK):
        n = start + tl.arange(0, N_BLOCK)
        x = tl.load(x_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        square += x * x
    x_scale = tl.rsqrt(tl.sum(square, 0) / N + eps)
    e = tl.arange(0, E_PAD)
    v = tl.load(v_ptr + b * v_b + g * v_g + e, mask=e < E, other=0.0).to(tl.float32)
    v_scale = tl.rsqrt(tl.sum(v * v, 0) / E + eps)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, INNER, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < INNER
        weight = tl.load(up_v_ptr + i[:, None] * E + e[None, :], mask=here[:, None] & (e[None, :] < E), other=0.0)
        inner = tl.sum(weight.to(tl.float32) * v[None, :], 1) * v_scale
        inner += tl.load(up_ptr + b * INNER + i, mask=here, other=0.0).to(tl.float32) * x_scale
        inner += tl.load(up_bias_ptr + i, mask=here, other=0.0).to(tl.float32)
        down = tl.load(down_ptr + g * INNER + i, mask=here, other=0.0).to(tl.float32)
        total += down * inner / (1 + tl.exp(-inner))
    direct = tl.load(direct_ptr + row).to(tl.float32) * x_scale + tl.load(direct_bias_ptr + g).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, 0) + direct)


@torch.library.custom_op("ahn_layers::score", mutates_args=())
@on_its_gpu
def score(
    x: Tensor, v: Tensor, up: Tensor, direct: Tensor, up_bias: Tensor, direct_bias: Tensor, up_v: Tensor, down: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """See ``LearnedScore``.

    Args:
        x: hidden states, ``(B, 1, N)``.
        v: values, ``(B, G, 1, E)``.
        up: ``up x`` without its bias, ``(B, 1, I)``.
        direct: ``direct x`` without its bias, ``(B, 1, G)``.
        up_bias: ``(I,)``.
        direct_bias: ``(G,)``.
        up_v: ``(I, E)``.
        down: ``(G, I)``.
        eps: in the normalisation of ``x`` and ``v``.

    Returns:
        ``(B, G, 1)`` float32.
    """
    b, groups, _, e = v.shape
    x, up, direct, up_v, down = (u.contiguous() for u in (x, up, direct, up_v, down))
    v = v if v.stride(-1) == 1 else v.contiguous()
    out = torch.empty(b, groups, 1, dtype=torch.float32, device=v.device)
    inner, size = down.shape[1], x.shape[2]
    block = min(64, triton.next_power_of_2(inner))
    _score[(b * groups,)](
        x, v, up, direct, up_bias, direct_bias, up_v, down, out, eps, *v.stride()[:2],
        G=groups, N=size, E=e, E_PAD=triton.next_power_of_2(e), INNER=inner, BLOCK=block,
        N_BLOCK=min(2048, triton.next_power_of_2(size)), num_warps=4,
    )  # fmt: skip
    return out


@score.register_fake
def _(x: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(*v.shape[:2], 1, dtype=torch.float32)
