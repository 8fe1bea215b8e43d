"""Triton kernels for one decode step: attention over the slots, and fold and read of the memory.

Both are bound by memory traffic: slots and state are read once. Attention is split over the slots (FlashDecoding),
so that a single row keeps the whole GPU busy; the parts are joined by a second kernel. The functions are custom
operators, so that ``torch.compile`` and CUDA graphs take them in without a break.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import operator

_LEAST = tl.constexpr(-1e30)
"""Instead of the largest logit where there is none: minus infinity has no difference from itself."""
_SHARED = 1 << 13
"""Elements of keys that a program loads at a time."""


@triton.jit
def _take_in(logits, v, largest, total, out):
    """The running softmax over what came before and these keys: largest logit, sum and weighted values."""
    now = tl.maximum(tl.maximum(largest, tl.max(logits, 1)), _LEAST)
    p = tl.exp(logits - now[:, None])
    fade = tl.exp(largest - now)
    out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    total = total * fade + tl.sum(p, 1)
    return now, total, out


@triton.jit
def _store_part(max_ptr, sum_ptr, out_ptr, at, largest, total, out, r, e, R: tl.constexpr, E: tl.constexpr):
    """One part of the attention of one group, number ``at`` of all parts, for ``_join``."""
    to = at * R + r
    tl.store(max_ptr + to, largest, mask=r < R)
    tl.store(sum_ptr + to, total, mask=r < R)
    tl.store(out_ptr + to[:, None] * E + e[None, :], out, mask=(r[:, None] < R) & (e[None, :] < E))


@triton.jit
def _attend(
    q_ptr, turned_ptr, k_ptr, v_ptr, max_ptr, sum_ptr, out_ptr, row, part, at, live, skipped, num_sinks, scale,
    part_size, q_b, q_h, t_b, t_h, k_b, k_g, k_c, v_b, v_g, v_c,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one group to one part of the first ``live`` slots, without the skipped one.

    ``at`` is where among all parts it is written.
    """
    b, g = (row // G).to(tl.int64), (row % G).to(tl.int64)
    r, d, e = tl.arange(0, R_PAD), tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    inside = (r[:, None] < R) & (d[None, :] < D)
    q = tl.load(q_ptr + b * q_b + (g * R + r[:, None]) * q_h + d[None, :], mask=inside, other=0.0)
    turned = q
    if TURNED:
        turned = tl.load(turned_ptr + b * t_b + (g * R + r[:, None]) * t_h + d[None, :], mask=inside, other=0.0)
    largest = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    out = tl.zeros((R_PAD, E_PAD), tl.float32)
    start = part * part_size
    stop = tl.minimum(start + part_size, live)
    k_ptr += b * k_b + g * k_g
    v_ptr += b * v_b + g * v_g
    for first in range(start, stop, BLOCK):
        c = first + tl.arange(0, BLOCK)
        held = (c < stop) & (c != skipped)
        k = tl.load(
            k_ptr + c[:, None].to(tl.int64) * k_c + d[None, :], mask=held[:, None] & (d[None, :] < D), other=0.0
        )
        v = tl.load(
            v_ptr + c[:, None].to(tl.int64) * v_c + e[None, :], mask=held[:, None] & (e[None, :] < E), other=0.0
        )
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TURNED:
            if first < num_sinks:
                logits = tl.where((c < num_sinks)[None, :], tl.dot(turned, tl.trans(k), input_precision="ieee"), logits)
        logits = tl.where(held[None, :], logits * scale, float("-inf"))
        largest, total, out = _take_in(logits, v, largest, total, out)
    _store_part(max_ptr, sum_ptr, out_ptr, at, largest, total, out, r, e, R, E)


@Kernel
@triton.jit
def _attend_to_part(
    q_ptr, turned_ptr, k_ptr, v_ptr, seen_ptr, max_ptr, sum_ptr, out_ptr,
    slots, num_sinks, scale, part_size, parts, q_b, q_h, t_b, t_h, k_b, k_g, k_c, v_b, v_g, v_c,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // parts
    live = tl.minimum(slots, tl.maximum(tl.load(seen_ptr + row // G), 1)).to(tl.int32)
    _attend(
        q_ptr, turned_ptr, k_ptr, v_ptr, max_ptr, sum_ptr, out_ptr, row, tl.program_id(0) % parts,
        tl.program_id(0).to(tl.int64), live, -1, num_sinks, scale, part_size,
        q_b, q_h, t_b, t_h, k_b, k_g, k_c, v_b, v_g, v_c, G, R, R_PAD, D, D_PAD, E, E_PAD, BLOCK, TURNED,
    )  # fmt: skip


@triton.jit
def _join(
    max_ptr, sum_ptr, part_ptr, head, e, parts, largest, total, out, R: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Channels ``e`` of the attention of one head, from its parts and what was attended to before."""
    base = (head // R) * parts * R + head % R
    for first in range(0, parts, PARTS):
        n = first + tl.arange(0, PARTS)
        at = base + n * R
        m = tl.load(max_ptr + at, mask=n < parts, other=float("-inf"))
        now = tl.maximum(largest, tl.max(m, 0))
        weight = tl.exp(m - now)
        part = tl.load(part_ptr + at[:, None] * E + e[None, :], mask=(n[:, None] < parts) & (e[None, :] < E), other=0.0)
        fade = tl.exp(largest - now)
        out = out * fade + tl.sum(part * weight[:, None], 0)
        total = total * fade + tl.sum(tl.load(sum_ptr + at, mask=n < parts, other=0.0) * weight, 0)
        largest = now
    return out / total


@Kernel
@triton.jit
def _join_parts(
    max_ptr, sum_ptr, part_ptr, out_ptr, parts, R: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    head, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    largest, total, nothing = tl.full((), _LEAST, tl.float32), tl.zeros((), tl.float32), tl.zeros((TILE,), tl.float32)
    out = _join(max_ptr, sum_ptr, part_ptr, head, e, parts, largest, total, nothing, R, E, TILE, PARTS)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


def parts_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, int], int, int]:
    """How the slots are cut for the GPU: constants of the kernel, slots in a part, number of parts.

    One program on every multiprocessor; two where rows are too many to be cut evenly, or tokens so small that a program
    waits for its first ones as long as for all the others.
    """
    (b, h, _, d), (groups, slots, e) = q.shape, v.shape[1:]
    d_pad, e_pad = (max(16, triton.next_power_of_2(u)) for u in (d, e))
    block = min(64, max(16, _SHARED // max(d_pad, e_pad)))
    if q.element_size() > 2:
        block //= 2
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 5
    rows = b * groups
    parts = max(1, programs * (2 if rows > 16 or max(d_pad, e_pad) <= 64 else 1) // rows)
    size = triton.cdiv(triton.cdiv(slots, parts), block) * block
    repeats = h // groups
    options = {
        "G": groups, "R": repeats, "R_PAD": max(16, triton.next_power_of_2(repeats)), "D": d, "D_PAD": d_pad,
        "E": e, "E_PAD": e_pad, "BLOCK": block, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    return options, size, triton.cdiv(slots, size)


@operator("ahn_layers::slot_attention")
def slot_attention(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, seen: Tensor, num_sinks: int, scale: float
) -> Tensor:
    """Attention of one query per row over the first ``max(seen, 1)`` slots.

    Args:
        q: ``(B, H, 1, D)``.
        turned: the queries as they face the first ``num_sinks`` slots.
        k: ``(B, G, C, D)``.
        v: ``(B, G, C, E)``.
        seen: tokens seen, ``(B,)`` int64: slots are filled in order.
        num_sinks: slots that ``turned`` faces; 0 if that is ``q`` itself.
        scale: logit factor.
    """
    q, turned, k, v = (u if u.stride(-1) == 1 else u.contiguous() for u in (q, turned, k, v))
    (b, h), (groups, slots, e) = q.shape[:2], v.shape[1:]
    options, size, parts = parts_of(q, k, v)
    largest, total = q.new_empty(2, b * groups, parts, h // groups, dtype=torch.float32)
    out_parts = q.new_empty(b * groups, parts, h // groups, e, dtype=torch.float32)
    _attend_to_part[(b * groups * parts,)](
        q, turned, k, v, seen, largest, total, out_parts, slots, num_sinks, scale, size, parts,
        *q.stride()[:2], *turned.stride()[:2], *k.stride()[:3], *v.stride()[:3], TURNED=num_sinks > 0, **options,
    )  # fmt: skip
    out = q.new_empty(b, h, 1, e)
    _join_parts[(b * h, triton.cdiv(e, 16))](
        largest, total, out_parts, out, parts, R=h // groups, E=e, TILE=16, PARTS=128, num_warps=4
    )
    return out


@slot_attention.register_fake
def _(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, seen: Tensor, num_sinks: int, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@Kernel
@triton.jit
def _fold_and_read(
    state_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, after_ptr, read_ptr,
    R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
    DECAYS: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    s, d = tl.program_id(0).to(tl.int64), tl.arange(0, D_PAD)
    e = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (d[:, None] < D) & (e[None, :] < E)
    at = s * D * E + d[:, None] * E + e[None, :]
    state = tl.load(state_ptr + at, mask=inside, other=0.0)
    k = tl.load(k_ptr + s * D + d, mask=d < D, other=0.0)
    v = tl.load(v_ptr + s * E + e, mask=e < E, other=0.0)
    if DECAYS:
        state = state * tl.exp(tl.load(g_ptr + s))
    if DELTA:
        v = tl.load(beta_ptr + s) * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * v[None, :]
    tl.store(after_ptr + at, state, mask=inside)
    for r in range(R):
        q = tl.load(q_ptr + (s * R + r) * D + d, mask=d < D, other=0.0)
        tl.store(read_ptr + (s * R + r) * E + e, tl.sum(state * q[:, None], 0), mask=e < E)


@operator("ahn_layers::fold_and_read")
def fold_and_read(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token folded and one query read per head, the state read and written once; all tensors float32.

    Args:
        state: ``(B, S, D, E)``.
        q: ``(B, H, D)``; H is a multiple of S.
        k: ``(B, S, D)``.
        v: ``(B, S, E)``.
        g: log decay, ``(B, S)``, None for no decay.
        beta: write strength of the delta rule, ``(B, S)``, None to add ``k v^T``.

    Returns:
        The readings ``(B, H, E)`` and the state after.
    """
    (b, states, d, e), h, tile = state.shape, q.shape[1], 32
    state, q, k, v = (u.contiguous() for u in (state, q, k, v))
    g, beta = (None if u is None else u.contiguous() for u in (g, beta))
    after, reading = torch.empty_like(state), q.new_empty(b, h, e)
    _fold_and_read[(b * states, triton.cdiv(e, tile))](
        state, q, k, v, state if g is None else g, state if beta is None else beta, after, reading,
        R=h // states, D=d, D_PAD=triton.next_power_of_2(d), E=e, TILE=tile, DECAYS=g is not None,
        DELTA=beta is not None, num_warps=4,
    )  # fmt: skip
    return reading, after


@fold_and_read.register_fake
def _(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), torch.empty_like(state)
