"""Triton kernels for the chunked scans, forward; the backward pass is in ``triton_scan_backward``.

Dimensions as in ``gated_scan``; n chunks of ``CHUNK`` tokens. Three steps: the chunks side by side, what each would
write into an empty state (``u``) and what the state takes off that (``w``); one chunk after the other, only the state
passing on, cut along the value size, whose columns do not depend on each other; and side by side again, what the
queries read.
Products take their operands in the dtype of ``k``: half precision as they are, float32 in three products of TF32, as
accurate as float32. Sums, decays and the state are float32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import operator

CHUNK = 64
EXACT = "tf32x3"


@triton.jit
def load_rows(base, first, length, stride, C: tl.constexpr, D, D_PAD: tl.constexpr):
    """Rows ``first`` to ``first + C`` of a matrix with ``D`` columns, zeros where it ends."""
    t, d = first + tl.arange(0, C), tl.arange(0, D_PAD)
    at = base + t[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(at, mask=(t[:, None] < length) & (d[None, :] < D), other=0.0)


@triton.jit
def unit_lower_inverse(system, C: tl.constexpr, EXACT: tl.constexpr):
    """The inverse of ``I + system``, a strictly lower triangular matrix: blocks of 16, then pairs of blocks."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    n, a, b = tl.arange(0, C // 16), tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    own = (n[:, None] == n[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(system, (C // 16, 16, C // 16, 16)), 0.0), 2)
    small = tl.where(a == b, 1.0, 0.0) + tl.zeros((C // 16, 16, 16), tl.float32)
    for r in range(1, 16):  # forward substitution, row r of all blocks at once
        weights = tl.sum(tl.where(a == r, blocks, 0.0), 1)
        known = tl.sum(weights[:, :, None] * small, 1)
        small -= tl.where(a == r, known[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(own, small[:, :, None, :], 0.0), (C, C))
    for level in tl.static_range(2):
        size = 32 << level
        below = tl.where((i // size == j // size) & (i // (size // 2) != j // (size // 2)), system, 0.0)
        inverse -= tl.dot(tl.dot(inverse, below, input_precision=EXACT), inverse, input_precision=EXACT)
    return inverse


@Kernel
@triton.jit(do_not_specialize=["length", "S"])
def _solve_chunks(
    k_ptr, v_ptr, total_ptr, beta_ptr, u_ptr, w_ptr, inverse_ptr, length, S, k_b, k_h, k_t, v_b, v_h, v_t,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, C: tl.constexpr, DECAYS: tl.constexpr, KEEP: tl.constexpr, EXACT: tl.constexpr,
    SOLVE: tl.constexpr,
):  # fmt: skip
    """``u = T (beta v)``, ``w = T (beta exp(total) k)`` with ``T = (I + A)^-1``; ``T`` too if ``KEEP``."""
    n, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, s, chunks = row // S, row % S, tl.num_programs(0)
    c = tl.arange(0, C)
    i, j = c[:, None], c[None, :]
    k = load_rows(k_ptr + b * k_b + s // K_SHARE * k_h, n * C, length, k_t, C, D, D_PAD)
    v = load_rows(v_ptr + b * v_b + s // V_SHARE * v_h, n * C, length, v_t, C, E, E_PAD)
    at = (row * chunks + n) * C + c
    beta = tl.load(beta_ptr + at)
    system = tl.dot(k, tl.trans(k), input_precision=EXACT) * beta[:, None]
    scale = beta
    if DECAYS:
        total = tl.load(total_ptr + at)
        system *= tl.exp(tl.where(i > j, total[:, None] - total[None, :], 0.0))
        scale *= tl.exp(total)
    inverse = unit_lower_inverse(tl.where(i > j, system, 0.0), C, SOLVE)
    u = tl.dot((inverse * beta[None, :]).to(k.dtype), v.to(k.dtype), input_precision=EXACT)
    w = tl.dot((inverse * scale[None, :]).to(k.dtype), k, input_precision=EXACT)
    d, e = tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    tl.store(u_ptr + at[:, None] * E + e[None, :], u.to(k.dtype), mask=e[None, :] < E)
    tl.store(w_ptr + at[:, None] * D + d[None, :], w.to(k.dtype), mask=d[None, :] < D)
    if KEEP:
        tl.store(inverse_ptr + at[:, None] * C + j, inverse.to(k.dtype))


@Kernel
@triton.jit(do_not_specialize=["length", "chunks", "S"])
def _states_between(
    state_ptr, k_ptr, v_ptr, total_ptr, w_ptr, before_ptr, written_ptr, after_ptr, length, chunks, S,
    k_b, k_h, k_t, v_b, v_h, v_t,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, C: tl.constexpr, DECAYS: tl.constexpr, DELTA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and after the last, and what every token really writes."""
    row = tl.program_id(1).to(tl.int64)
    b, s, edge = row // S, row % S, tl.program_id(0) * TILE
    c, d, e = tl.arange(0, C), tl.arange(0, D_PAD), edge + tl.arange(0, TILE)
    inside = (d[:, None] < D) & (e[None, :] < E)
    tile = d[:, None] * E + e[None, :]
    state = tl.load(state_ptr + row * D * E + tile, mask=inside, other=0.0)
    k_ptr += b * k_b + s // K_SHARE * k_h
    v_ptr += b * v_b + s // V_SHARE * v_h
    for n in range(0, chunks):
        k = load_rows(k_ptr, n * C, length, k_t, C, D, D_PAD)
        operand = state.to(k.dtype)
        tl.store(before_ptr + (row * chunks + n) * D * E + tile, operand, mask=inside)
        v = load_rows(v_ptr + edge, n * C, length, v_t, C, E - edge, TILE)
        at = (row * chunks + n) * C + c
        written = v.to(tl.float32)
        if DELTA:
            w = tl.load(w_ptr + at[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
            written -= tl.dot(w, operand, input_precision=EXACT)
        tl.store(written_ptr + at[:, None] * E + e[None, :], written.to(k.dtype), mask=e[None, :] < E)
        if DECAYS:
            last = tl.load(total_ptr + (row * chunks + n) * C + C - 1)
            written *= tl.exp(last - tl.load(total_ptr + at))[:, None]
            state *= tl.exp(last)
        state += tl.dot(tl.trans(k), written.to(k.dtype), input_precision=EXACT)
    tl.store(after_ptr + row * D * E + tile, state, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["length", "chunks", "S"])
def _read_chunks(
    q_ptr, k_ptr, total_ptr, before_ptr, written_ptr, read_ptr, length, chunks, S, q_b, q_h, q_t, k_b, k_h, k_t,
    K_SHARE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What the queries of a chunk read: from the state before it, and from the tokens of the chunk up to their own."""
    n, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, s, edge = row // S, row % S, tl.program_id(2) * TILE
    c, d, e = tl.arange(0, C), tl.arange(0, D_PAD), edge + tl.arange(0, TILE)
    i, j, t = c[:, None], c[None, :], n * C + c
    inside = (d[:, None] < D) & (e[None, :] < E)
    k = load_rows(k_ptr + b * k_b + s // K_SHARE * k_h, n * C, length, k_t, C, D, D_PAD)
    before = tl.load(before_ptr + (row * chunks + n) * D * E + d[:, None] * E + e[None, :], mask=inside, other=0.0)
    at = (row * chunks + n) * C + c
    written = tl.load(written_ptr + at[:, None] * E + e[None, :], mask=e[None, :] < E, other=0.0)
    total = tl.zeros((C,), tl.float32)
    if DECAYS:
        total = tl.load(total_ptr + at)
    between = tl.where(i >= j, tl.exp(tl.where(i >= j, total[:, None] - total[None, :], 0.0)), 0.0)
    for r in range(R):
        head = s * R + r
        q = load_rows(q_ptr + b * q_b + head * q_h, n * C, length, q_t, C, D, D_PAD).to(k.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * between
        out = tl.dot(q, before, input_precision=EXACT) * tl.exp(total)[:, None]
        out += tl.dot(scores.to(k.dtype), written, input_precision=EXACT)
        out_at = ((b * S * R + head) * length + t)[:, None] * E + e[None, :]
        tl.store(read_ptr + out_at, out.to(read_ptr.dtype.element_ty), mask=(t[:, None] < length) & (e[None, :] < E))


class Scan:
    """The tensors of one scan as the kernels take them, and the launches of the forward pass."""

    def __init__(self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> None:
        q, k, v = (u if u.stride(-1) == 1 else u.contiguous() for u in (q, k, v))
        self.state, self.q, self.k, self.v = state.contiguous(), q, k, v
        (self.b, self.states, d, e), (self.heads, self.length) = state.shape, q.shape[1:3]
        self.chunks = max(2, triton.cdiv(self.length, CHUNK))  # triton 3.6 miscompiles a loop that it knows to run once
        self.rows = self.b * self.states
        fill = self.chunks * CHUNK - self.length
        g, beta = (None if u is None else (F.pad(u, (0, fill)) if fill else u).contiguous() for u in (g, beta))
        self.total = None if g is None else g.unflatten(-1, (self.chunks, CHUNK)).cumsum(-1)
        self.strength = beta
        self.repeats = self.heads // self.states
        self.k_share, self.v_share = self.states // k.shape[1], self.states // v.shape[1]
        d_pad, self.e_pad = (max(16, triton.next_power_of_2(size)) for size in (d, e))
        self.sizes: dict[str, Any] = {
            "D": d, "D_PAD": d_pad, "E": e, "C": CHUNK, "DECAYS": g is not None, "EXACT": EXACT
        }  # fmt: skip
        self.decay = state if self.total is None else self.total
        self.exact = k.dtype == torch.float32
        self.wide = 8 if max(d_pad, self.e_pad) > 64 or self.exact else 4
        self.stages = 2 if self.exact else 3  # of the loop over chunks; with 1, triton 3.6 reads beyond its memory

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor per state, in the dtype of the products."""
        return self.k.new_empty(self.rows, *shape, dtype=dtype or self.k.dtype)

    def solve(self, *, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """``u``, ``w`` and, if it is to be kept, ``T`` of every chunk."""
        padded = self.chunks * CHUNK
        u, w = (self.empty(padded, self.sizes[name]) for name in ("E", "D"))
        inverse = self.empty(padded, CHUNK) if keep else u
        _solve_chunks[(self.chunks, self.rows)](
            self.k, self.v, self.decay, self.strength, u, w, inverse, self.length, self.states,
            *self.k.stride()[:3], *self.v.stride()[:3], K_SHARE=self.k_share, V_SHARE=self.v_share, E_PAD=self.e_pad,
            KEEP=keep, SOLVE=EXACT if self.exact else "tf32", num_warps=self.wide if self.exact else 2, num_stages=1,
            **self.sizes,
        )  # fmt: skip
        return u, w, inverse

    def between(self, u: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The states before the chunks, what the tokens write, and the state after."""
        before = self.empty(self.chunks, self.sizes["D"], self.sizes["E"])
        written, after = self.empty(self.chunks * CHUNK, self.sizes["E"]), torch.empty_like(self.state)
        tile = min(self.e_pad, 32)
        if u is None:
            v, strides, share = self.v, self.v.stride()[:3], self.v_share
        else:
            v, strides, share = u, (self.states * u.stride(0), u.stride(0), u.stride(1)), 1
        _states_between[(triton.cdiv(self.sizes["E"], tile), self.rows)](
            self.state, self.k, v, self.decay, v if w is None else w, before, written, after, self.length, self.chunks,
            self.states, *self.k.stride()[:3], *strides, K_SHARE=self.k_share, V_SHARE=share, TILE=tile,
            DELTA=w is not None, num_warps=4, num_stages=self.stages, **self.sizes,
        )  # fmt: skip
        return before, written, after

    def read(self, before: Tensor, written: Tensor) -> Tensor:
        """What the queries read, in the dtype of the products."""
        reading = self.k.new_empty(self.b, self.heads, self.length, self.sizes["E"])
        tile = min(self.e_pad, 64 if self.exact else 128)
        _read_chunks[(self.chunks, self.rows, triton.cdiv(self.sizes["E"], tile))](
            self.q, self.k, self.decay, before, written, reading, self.length, self.chunks, self.states,
            *self.q.stride()[:3], *self.k.stride()[:3], K_SHARE=self.k_share, R=self.repeats, TILE=tile,
            num_warps=self.wide, num_stages=1, **self.sizes,
        )  # fmt: skip
        return reading

    def run(self) -> tuple[Tensor, Tensor]:
        """Readings and the state after."""
        u, w = (None, None) if self.strength is None else self.solve()[:2]
        before, written, after = self.between(u, w)
        return self.read(before, written), after

    def run_and_keep(self) -> tuple[Tensor, ...]:
        """Readings, the state after, and what the backward pass needs."""
        u, w, inverse = (None, None, None) if self.strength is None else self.solve(keep=True)
        before, written, after = self.between(u, w)
        kept = (before, written, *(self.k.new_empty(0) if t is None else t for t in (u, w, inverse)))
        return self.read(before, written), after, *kept


@operator("ahn_layers::chunked_scan")
def chunked_scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fold and read token by token, without gradients.

    Args:
        state: ``(B, S, D, E)``, float32.
        q: ``(B, H, T, D)``, as ``k`` and ``v`` of any floating dtype; H is a multiple of S.
        k: ``(B, G, T, D)``; S is a multiple of G. Its dtype is that of the products' operands.
        v: ``(B, G', T, E)``; S is a multiple of G'.
        g: log decay, ``(B, S, T)`` float32, None for no decay.
        beta: write strength of the delta rule, ``(B, S, T)`` float32, None to add ``k v^T``.

    Returns:
        The readings ``(B, H, T, E)`` in the dtype of ``k``, and the state after.
    """
    return Scan(state, q, k, v, g, beta).run()


@chunked_scan.register_fake
def _(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    return k.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(state)
