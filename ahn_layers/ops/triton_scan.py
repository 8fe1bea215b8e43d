"""Triton kernels for the chunked scans, forward only: reading long prompts.

Dimensions as in ``linear_scan``. First the chunks side by side: what each would write into an empty state (``u``), and
what the state takes off that (``w``). Then one chunk after the other, the state in registers, cut along the value size,
whose columns do not depend on each other. Products are split into three of TF32, as accurate as float32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 64


@triton.jit
def _solve_chunks(
    k_ptr, v_ptr, beta_ptr, g_ptr, u_ptr, w_ptr, length, v_s, v_t, S,
    D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, C: tl.constexpr,
    DECAYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c, d, e = tl.arange(0, C), tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    t = n * C + c
    here = t < length
    row = s * length + t
    k = tl.load(k_ptr + row[:, None] * D + d[None, :], mask=here[:, None] & (d[None, :] < D), other=0.0)
    beta = tl.load(beta_ptr + row, mask=here, other=0.0)
    i, j = c[:, None], c[None, :]
    system = tl.dot(k, tl.trans(k), input_precision=EXACT) * beta[:, None]
    since = tl.full((C,), 1.0, tl.float32)
    if DECAYS:
        total = tl.cumsum(tl.load(g_ptr + row, mask=here, other=0.0), 0)
        system = system * tl.exp(tl.where(i > j, total[:, None] - total[None, :], 0.0))
        since = tl.exp(total)
    system = tl.where(i > j, system, 0.0)
    inverse = tl.where(i == j, 1.0, 0.0)
    for r in range(1, C):  # forward substitution, row by row
        weights = tl.sum(tl.where(i == r, system, 0.0), 0)
        inverse -= tl.where(i == r, tl.sum(weights[:, None] * inverse, 0)[None, :], 0.0)
    inverse = inverse * beta[None, :]
    v_at = v_ptr + s * v_s + t[:, None].to(tl.int64) * v_t + e[None, :]
    v = tl.load(v_at, mask=here[:, None] & (e[None, :] < E), other=0.0).to(tl.float32)
    out = (s * S + t)[:, None]
    u = tl.dot(inverse, v, input_precision=EXACT)
    tl.store(u_ptr + out * E + e[None, :], u, mask=e[None, :] < E)
    w = tl.dot(inverse * since[None, :], k, input_precision=EXACT)
    tl.store(w_ptr + out * D + d[None, :], w, mask=d[None, :] < D)


@triton.jit
def _run_chunks(
    state_ptr, q_ptr, k_ptr, g_ptr, u_ptr, w_ptr, after_ptr, read_ptr, length, u_length,
    R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
    DECAYS: tl.constexpr, DELTA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1).to(tl.int64)
    c, d, e = tl.arange(0, C), tl.arange(0, D_PAD), tl.program_id(0) * TILE + tl.arange(0, TILE)
    i, j = c[:, None], c[None, :]
    tile = s * D * E + d[:, None] * E + e[None, :]
    inside = (d[:, None] < D) & (e[None, :] < E)
    state = tl.load(state_ptr + tile, mask=inside, other=0.0)
    for first in range(0, length, C):
        t = first + c
        here = t < length
        row, keys = s * length + t, here[:, None] & (d[None, :] < D)
        k = tl.load(k_ptr + row[:, None] * D + d[None, :], mask=keys, other=0.0)
        u_row = s * u_length + t
        u = tl.load(u_ptr + u_row[:, None] * E + e[None, :], mask=here[:, None] & (e[None, :] < E), other=0.0)
        u = u.to(tl.float32)
        if DELTA:
            w = tl.load(w_ptr + u_row[:, None] * D + d[None, :], mask=keys, other=0.0)
            u -= tl.dot(w, state, input_precision=EXACT)
        total = tl.zeros((C,), tl.float32)
        if DECAYS:
            total = tl.cumsum(tl.load(g_ptr + row, mask=here, other=0.0), 0)
        between = tl.where(i >= j, tl.exp(tl.where(i >= j, total[:, None] - total[None, :], 0.0)), 0.0)
        for r in range(R):
            at = (s * R + r) * length + t
            q = tl.load(q_ptr + at[:, None] * D + d[None, :], mask=keys, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * between
            out = tl.dot(q * tl.exp(total)[:, None], state, input_precision=EXACT)
            out += tl.dot(scores, u, input_precision=EXACT)
            tl.store(read_ptr + at[:, None] * E + e[None, :], out, mask=here[:, None] & (e[None, :] < E))
        last = tl.sum(tl.where(c == C - 1, total, 0.0), 0)
        tail = k * tl.exp(last - total)[:, None]
        state = state * tl.exp(last) + tl.dot(tl.trans(tail), u, input_precision=EXACT)
    tl.store(after_ptr + tile, state, mask=inside)


@torch.library.custom_op("ahn_layers::chunked_scan", mutates_args=())
def chunked_scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fold and read token by token; all tensors float32, except ``v``, which may be of any floating dtype.

    Args:
        state: ``(B, S, D, E)``.
        q: ``(B, H, T, D)``; H is a multiple of S.
        k: ``(B, S, T, D)``.
        v: ``(B, S, T, E)``.
        g: log decay, ``(B, S, T)``, None for no decay.
        beta: write strength of the delta rule, ``(B, S, T)``, None to add ``k v^T``.

    Returns:
        The readings ``(B, H, T, E)`` and the state after.
    """
    (b, states, d, e), (h, length) = state.shape, q.shape[1:3]
    state, q, k, v = (u.contiguous() for u in (state, q, k, v))
    g, beta = (None if u is None else u.contiguous() for u in (g, beta))
    d_pad, e_pad = (max(16, triton.next_power_of_2(size)) for size in (d, e))
    u, w, u_length = v, k, length
    sizes = {"D": d, "D_PAD": d_pad, "E": e, "C": _CHUNK, "DECAYS": g is not None, "EXACT": "tf32x3"}
    decay = state if g is None else g
    if beta is not None:
        chunks = triton.cdiv(length, _CHUNK)
        u_length = chunks * _CHUNK
        u, w = (q.new_empty(b, states, u_length, size) for size in (e, d))
        _solve_chunks[(chunks, b * states)](
            k, v, beta, decay, u, w, length, length * e, e, u_length, E_PAD=e_pad, num_warps=4, num_stages=1, **sizes
        )
    after, reading = torch.empty_like(state), q.new_empty(b, h, length, e)
    tile = min(e_pad, 32)
    _run_chunks[(triton.cdiv(e, tile), b * states)](
        state, q, k, decay, u, w, after, reading, length, u_length,
        R=h // states, TILE=tile, DELTA=beta is not None, num_warps=4, num_stages=1, **sizes,
    )  # fmt: skip
    return reading, after


@chunked_scan.register_fake
def _(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(state)
