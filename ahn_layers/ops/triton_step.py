"""Triton kernels for a whole decode step of a layer in three launches: exchange, attend and fold, finish.

1. *Exchange*: the new token takes the slot of the one that leaves.
2. *Attend and fold*: some programs attend to a part of the slots each, others fold the token that left into a tile of
   the memory and read it. Neither waits for the other, so the memory costs no time of its own.
3. *Finish*: the parts of the attention are joined; what was read is normalised, gated, multiplied and added.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_decode import _attend, _join, parts_of

_TILE = 32
"""Channels of the memory's values that a program folds and reads."""


@triton.jit
def _swap(slots, new, out, b, slot, s_b, s_h, s_c, n_b, n_h, H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, H * E, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h, e, inside = i // E, i % E, i < H * E
        at = slots + b * s_b + h.to(tl.int64) * s_h + slot * s_c + e
        tl.store(out + b * H * E + i, tl.load(at, mask=inside), mask=inside)
        tl.store(at, tl.load(new + b * n_b + h * n_h + e, mask=inside), mask=inside)


@triton.jit
def _exchange(
    seen_ptr, num_sinks, window_size,
    s0, n0, o0, s0_b, s0_h, s0_c, n0_b, n0_h, s1, n1, o1, s1_b, s1_h, s1_c, n1_b, n1_h,
    s2, n2, o2, s2_b, s2_h, s2_c, n2_b, n2_h, s3, n3, o3, s3_b, s3_h, s3_c, n3_b, n3_h,
    H0: tl.constexpr, E0: tl.constexpr, H1: tl.constexpr, E1: tl.constexpr,
    H2: tl.constexpr, H3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    seen = tl.load(seen_ptr + b)
    slot = tl.where(seen < num_sinks, seen, num_sinks + (seen - num_sinks) % window_size)
    _swap(s0, n0, o0, b, slot, s0_b, s0_h, s0_c, n0_b, n0_h, H0, E0, BLOCK)
    _swap(s1, n1, o1, b, slot, s1_b, s1_h, s1_c, n1_b, n1_h, H1, E1, BLOCK)
    if H2 > 0:
        _swap(s2, n2, o2, b, slot, s2_b, s2_h, s2_c, n2_b, n2_h, H2, 1, 128)
    if H3 > 0:
        _swap(s3, n3, o3, b, slot, s3_b, s3_h, s3_c, n3_b, n3_h, H3, 1, 128)
    tl.debug_barrier()  # every thread has read the number before it changes
    tl.store(seen_ptr + b, seen + 1)


@torch.library.custom_op("ahn_layers::exchange", mutates_args=("slots", "evicted", "seen"))
def exchange(slots: list[Tensor], new: list[Tensor], evicted: list[Tensor], seen: Tensor, num_sinks: int) -> None:
    """One token of every row takes the slot of its rank, and ``seen`` counts it.

    Args:
        slots: keys ``(B, G, C, D)``, values ``(B, G, C, E)``, and up to two gates ``(B, S, C)``.
        new: the same with one column.
        evicted: takes what was there, contiguous.
        seen: tokens seen before, ``(B,)`` int64.
        num_sinks: leading slots that are never overwritten.
    """
    slots = [u if u.ndim == 4 else u.unsqueeze(3) for u in slots]
    new = [u.unsqueeze(3) if u.ndim == 3 else u if u.stride(3) == 1 else u.contiguous() for u in new]
    given = [
        (s, n, o, s.stride(0), s.stride(1), s.stride(2), n.stride(0), n.stride(1))
        for s, n, o in zip(slots, new, evicted, strict=True)
    ]
    given += [(given[0])] * (4 - len(given))
    heads = [u.shape[1] for u in new] + [0, 0]
    _exchange[(seen.shape[0],)](
        seen, num_sinks, slots[0].shape[2] - num_sinks, *[u for each in given for u in each],
        H0=heads[0], E0=new[0].shape[3], H1=heads[1], E1=new[1].shape[3], H2=heads[2], H3=heads[3],
        BLOCK=512, num_warps=4,
    )  # fmt: skip


@exchange.register_fake
def _(slots: list[Tensor], new: list[Tensor], evicted: list[Tensor], seen: Tensor, num_sinks: int) -> None:
    return None


@triton.jit
def _normal(u, eps, scale):
    """``scale * u / sqrt(sum(u^2) + eps)`` of a vector."""
    return u * (scale * tl.rsqrt(tl.sum(u * u, 0) + eps))


@triton.jit
def _attend_and_fold(
    q_ptr, turned_ptr, k_ptr, v_ptr, seen_ptr, max_ptr, sum_ptr, part_ptr,
    asking_ptr, key_ptr, value_ptr, g_ptr, strength_ptr, memory_ptr, reading_ptr,
    slots, num_sinks, scale, part_size, parts, attending, eps, read_scale,
    q_b, q_h, t_b, t_h, a_b, a_h, k_b, k_g, k_c, v_b, v_g, v_c,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    DECAYS: tl.constexpr, WEIGHED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < attending:
        _attend(
            q_ptr, turned_ptr, k_ptr, v_ptr, seen_ptr, max_ptr, sum_ptr, part_ptr, program // parts, program % parts,
            parts, slots, num_sinks, scale, part_size, q_b, q_h, t_b, t_h, k_b, k_g, k_c, v_b, v_g, v_c,
            G, R, R_PAD, D, D_PAD, E, E_PAD, BLOCK, TURNED,
        )  # fmt: skip
    else:
        tiles: tl.constexpr = (E + TILE - 1) // TILE
        at = ((program - attending) // tiles).to(tl.int64)
        b, s = at // S, at % S
        d, e = tl.arange(0, D_PAD), (program - attending) % tiles * TILE + tl.arange(0, TILE)
        reads: tl.constexpr = G * R // S
        read_at = reading_ptr + at * reads * E + e
        if tl.load(seen_ptr + b) > slots:  # the arrival pushed a token out
            inside = (d[:, None] < D) & (e[None, :] < E)
            state_at = memory_ptr + at * D * E + d[:, None] * E + e[None, :]
            state = tl.load(state_at, mask=inside, other=0.0)
            held = b * G + s * G // S
            k = tl.load(key_ptr + held * D + d, mask=d < D, other=0.0).to(tl.float32)
            v = tl.load(value_ptr + held * E + e, mask=e < E, other=0.0).to(tl.float32)
            k = _normal(k, eps, 1.0)
            if DECAYS:
                state = state * tl.exp(tl.load(g_ptr + at).to(tl.float32))
            if DELTA:
                v -= tl.sum(state * k[:, None], 0)
            if WEIGHED:
                v *= tl.load(strength_ptr + at).to(tl.float32)
            state += k[:, None] * v[None, :]
            tl.store(state_at, state, mask=inside)
            for r in range(reads):
                h = s * reads + r
                q = tl.load(asking_ptr + b * a_b + h * a_h + d, mask=d < D, other=0.0).to(tl.float32)
                read = tl.sum(state * _normal(q, eps, read_scale)[:, None], 0)
                tl.store(read_at + r * E, read, mask=e < E)
        else:
            for r in range(reads):
                tl.store(read_at + r * E, tl.zeros((TILE,), tl.float32), mask=e < E)


@triton.jit
def _finish(
    max_ptr, sum_ptr, part_ptr, reading_ptr, weight_ptr, gate_ptr, matrix_ptr, out_ptr, parts, eps, H,
    R: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    RECALLS: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    head, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    out = _join(max_ptr, sum_ptr, part_ptr, head, e, parts, R, E, TILE, PARTS)
    if RECALLS:
        i = tl.arange(0, E_PAD)
        r = tl.load(reading_ptr + head * E + i, mask=i < E, other=0.0)
        r *= tl.rsqrt(tl.sum(r * r, 0) / E + eps)
        if SCALED:
            r *= tl.load(weight_ptr + i, mask=i < E, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(gate_ptr + head).to(tl.float32)
            r *= gate / (1 + tl.exp(-gate))
        inside = (i[:, None] < E) & (e[None, :] < E)
        matrix = tl.load(matrix_ptr + (head % H * E + i[:, None]) * E + e[None, :], mask=inside, other=0.0)
        out += tl.sum(matrix.to(tl.float32) * r[:, None], 0)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


@torch.library.custom_op("ahn_layers::attend_and_fold", mutates_args=("memory",))
def attend_and_fold(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, seen: Tensor, num_sinks: int, scale: float,
    asking: Tensor, key: Tensor, value: Tensor, g: Tensor | None, strength: Tensor | None, memory: Tensor,
    delta: bool, eps: float, read_scale: float, weight: Tensor | None, gate: Tensor | None, matrix: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one query per row over the slots; the token that left is folded, and the memory read.

    Args:
        q: ``(B, H, 1, D)``.
        turned: the queries as they face the first ``num_sinks`` slots.
        k: keys by slot, ``(B, G, C, D)``.
        v: values by slot, ``(B, G, C, E)``.
        seen: tokens seen, the new one included, ``(B,)`` int64.
        num_sinks: slots that ``turned`` faces; 0 if that is ``q`` itself.
        scale: logit factor.
        asking: the queries as they read the memory, ``(B, H, 1, D)``.
        key: of the token that left, ``(B, G, 1, D)``, contiguous as the next two.
        value: ``(B, G, 1, E)``.
        g: log decay ``(B, S)``, None for none.
        strength: factor of the value ``(B, S)``, None for one.
        memory: ``(B, S, D, E)`` float32, changed where a token left: ``seen > C``.
        delta: whether what is stored under the key is subtracted from the value.
        eps: in the normalisation of keys and queries.
        read_scale: factor of the normalised queries.
        weight: factor of the normalised reading ``(E,)``, None for one.
        gate: logits of its gate ``(B, H)``, with ``silu``, None for none.
        matrix: ``(H, E, E)``, through which the reading is added to the attention; None adds nothing.
        norm_eps: in the normalisation of the reading.

    Returns:
        The attention, with what the memory adds, and what was read: ``(B, H, 1, E)``, zero where nothing left.
    """
    (b, h), (groups, slots, e), states = q.shape[:2], v.shape[1:], memory.shape[1]
    q, turned, asking, k, v = (u if u.stride(-1) == 1 else u.contiguous() for u in (q, turned, asking, k, v))
    assert key.is_contiguous() and value.is_contiguous() and memory.is_contiguous()
    g, strength, weight, gate, matrix = (
        None if u is None else u.contiguous() for u in (g, strength, weight, gate, matrix)
    )
    options, size, parts = parts_of(q, k, v)
    repeats, tile = h // groups, min(_TILE, triton.next_power_of_2(e))
    largest, total = q.new_empty(2, b * groups, parts, repeats, dtype=torch.float32)
    partial = q.new_empty(b * groups, parts, repeats, e, dtype=torch.float32)
    reading, out = q.new_empty(b, h, 1, e, dtype=torch.float32), q.new_empty(b, h, 1, e)
    attending = b * groups * parts
    _attend_and_fold[(attending + b * states * triton.cdiv(e, tile),)](
        q, turned, k, v, seen, largest, total, partial, asking, key, value, memory if g is None else g,
        memory if strength is None else strength, memory, reading, slots, num_sinks, scale, size, parts, attending,
        eps, read_scale, *q.stride()[:2], *turned.stride()[:2], *asking.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        TURNED=num_sinks > 0, S=states, TILE=tile, DECAYS=g is not None, WEIGHED=strength is not None, DELTA=delta,
        **options,
    )  # fmt: skip
    _finish[(b * h, triton.cdiv(e, 16))](
        largest, total, partial, reading, reading if weight is None else weight, reading if gate is None else gate,
        reading if matrix is None else matrix, out, parts, norm_eps, h, R=repeats, E=e,
        E_PAD=triton.next_power_of_2(e), TILE=16, PARTS=128, RECALLS=matrix is not None, SCALED=weight is not None,
        GATED=gate is not None, num_warps=4,
    )  # fmt: skip
    return out, reading


@attend_and_fold.register_fake
def _(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, torch.empty_like(out, dtype=torch.float32)
