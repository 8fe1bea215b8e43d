"""Triton kernels for a whole decode step of a layer in two launches.

1. *Attend and fold*: some programs attend to a part of the slots each, all but the one whose token leaves; others fold
   that token into a tile of the memory and read it. Neither waits for the other: the memory costs no time of its own.
2. *Finish*: the new token joins the parts of the attention and takes its slot; what was read is normalised, gated,
   multiplied and added. Since Hopper it starts while the first one ends.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_forms import early_launch, on_its_gpu
from .triton_decode import _attend, _join, parts_of

_TILE = 32
"""Channels of the memory's values that a program folds and reads."""
_FINISH_TILE, _FINISH_WARPS = 16, 1
"""Channels of the output that a program of the second launch makes, and its warps."""


@triton.jit
def _slot(seen, slots, num_sinks):
    """Where the token of this rank goes, as ``Window.slot``."""
    return tl.where(seen < num_sinks, seen, num_sinks + (seen - num_sinks) % (slots - num_sinks))


@triton.jit
def _normal(u, eps, scale):
    """``scale * u / sqrt(sum(u^2) + eps)`` of a vector."""
    return u * (scale * tl.rsqrt(tl.sum(u * u, 0) + eps))


@triton.jit
def _attend_and_fold(
    q_ptr, turned_ptr, k_ptr, v_ptr, seen_ptr, now_ptr, max_ptr, sum_ptr, part_ptr,
    asking_ptr, key_ptr, decay_ptr, rate_ptr, strength_ptr, memory_ptr, reading_ptr,
    slots, num_sinks, facing, scale, part_size, parts, attending, eps, read_scale,
    q_b, q_h, t_b, t_h, a_b, a_h, k_b, k_g, k_c, v_b, v_g, v_c, d_b, d_s, d_c, s_b, s_s, s_c,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    KEYED: tl.constexpr, DECAYS: tl.constexpr, RATED: tl.constexpr, WEIGHED: tl.constexpr, DELTA: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < attending:
        row, part = program // parts, program % parts
        seen = tl.load(seen_ptr + row // G)
        if (row % G == 0) & (part == 0):
            tl.store(now_ptr + row // G, seen + 1)
        _attend(
            q_ptr, turned_ptr, k_ptr, v_ptr, max_ptr, sum_ptr, part_ptr, row, part, parts,
            tl.minimum(slots, seen).to(tl.int32), _slot(seen, slots, num_sinks).to(tl.int32), facing, scale, part_size,
            q_b, q_h, t_b, t_h, k_b, k_g, k_c, v_b, v_g, v_c, G, R, R_PAD, D, D_PAD, E, E_PAD, BLOCK, TURNED,
        )  # fmt: skip
    else:
        tiles: tl.constexpr = (E + TILE - 1) // TILE
        at = ((program - attending) // tiles).to(tl.int64)
        b, s = at // S, at % S
        d, e = tl.arange(0, D_PAD), (program - attending) % tiles * TILE + tl.arange(0, TILE)
        reads: tl.constexpr = G * R // S
        read_at = reading_ptr + at * reads * E + e
        seen = tl.load(seen_ptr + b)
        if seen >= slots:  # a token leaves
            slot, g = _slot(seen, slots, num_sinks), s * G // S
            inside = (d[:, None] < D) & (e[None, :] < E)
            state_at = memory_ptr + at * D * E + d[:, None] * E + e[None, :]
            state = tl.load(state_at, mask=inside, other=0.0)
            key_at = k_ptr + b * k_b + g * k_g + slot * k_c
            if KEYED:
                key_at = key_ptr + (b * G + g) * D
            k = _normal(tl.load(key_at + d, mask=d < D, other=0.0).to(tl.float32), eps, 1.0)
            v = tl.load(v_ptr + b * v_b + g * v_g + slot * v_c + e, mask=e < E, other=0.0).to(tl.float32)
            if DECAYS or RATED:
                decay = tl.full((), 1.0, tl.float32)
                if DECAYS:
                    decay *= tl.load(decay_ptr + b * d_b + s * d_s + slot * d_c).to(tl.float32)
                if RATED:
                    decay *= tl.load(rate_ptr + s).to(tl.float32)
                state = state * tl.exp(decay)
            if DELTA:
                v -= tl.sum(state * k[:, None], 0)
            if WEIGHED:
                v *= tl.load(strength_ptr + b * s_b + s * s_s + slot * s_c).to(tl.float32)
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
    q_ptr, k_ptr, v_ptr, k_slots_ptr, v_slots_ptr, seen_ptr, now_ptr, max_ptr, sum_ptr, part_ptr,
    reading_ptr, weight_ptr, gate_ptr, matrix_ptr, out_ptr, new0_ptr, new1_ptr, gates0_ptr, gates1_ptr,
    slots, num_sinks, scale, parts, eps, q_b, q_h, k_b, k_g, v_b, v_g, ks_b, ks_g, ks_c, vs_b, vs_g, vs_c,
    n0_b, n0_s, n1_b, n1_s, g0_b, g0_s, g0_c, g1_b, g1_s, g1_c,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, GATES: tl.constexpr, S: tl.constexpr,
    RECALLS: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, g, d, e = head // H, head % H, head % H // R, tl.arange(0, D_PAD), tile * TILE + tl.arange(0, TILE)
    q = tl.load(q_ptr + b * q_b + h * q_h + d, mask=d < D, other=0.0)
    k = tl.load(k_ptr + b * k_b + g * k_g + d, mask=d < D, other=0.0)
    v = tl.load(v_ptr + b * v_b + g * v_g + e, mask=e < E, other=0.0)
    logit = tl.sum(q.to(tl.float32) * k.to(tl.float32), 0) * scale
    if RECALLS:
        i = tl.arange(0, E_PAD)
        inside = (i[:, None] < E) & (e[None, :] < E)
        matrix = tl.load(matrix_ptr + (h * E + i[:, None]) * E + e[None, :], mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            matrix *= tl.load(weight_ptr + i, mask=i < E, other=0.0).to(tl.float32)[:, None]
        if GATED:
            gate = tl.load(gate_ptr + head).to(tl.float32)
            matrix *= gate / (1 + tl.exp(-gate))
    if EARLY:
        tl.extra.cuda.gdc_wait()  # for the first kernel, which has waited for all the others
    now = tl.load(now_ptr + b)
    one = tl.full((), 1.0, tl.float32)
    if RECALLS:
        r = tl.load(reading_ptr + head * E + i, mask=i < E, other=0.0)
    out = _join(max_ptr, sum_ptr, part_ptr, head, e, parts, logit, one, v.to(tl.float32), R, E, TILE, PARTS)
    if RECALLS:
        out += tl.sum(matrix * (r * tl.rsqrt(tl.sum(r * r, 0) / E + eps))[:, None], 0)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    slot = _slot(now - 1, slots, num_sinks)
    if h % R == 0:
        tl.store(v_slots_ptr + b * vs_b + g * vs_g + slot * vs_c + e, v, mask=e < E)
        if tile == 0:
            tl.store(k_slots_ptr + b * ks_b + g * ks_g + slot * ks_c + d, k, mask=d < D)
    if tile == 0:
        if h == 0:
            tl.store(seen_ptr + b, now)
        if h < S:
            if GATES > 0:
                tl.store(gates0_ptr + b * g0_b + h * g0_s + slot * g0_c, tl.load(new0_ptr + b * n0_b + h * n0_s))
            if GATES > 1:
                tl.store(gates1_ptr + b * g1_b + h * g1_s + slot * g1_c, tl.load(new1_ptr + b * n1_b + h * n1_s))


@torch.library.custom_op("ahn_layers::decode_step", mutates_args=("k_slots", "v_slots", "gates", "seen", "memory"))
@on_its_gpu
def decode_step(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, new_gates: list[Tensor], k_slots: Tensor, v_slots: Tensor,
    gates: list[Tensor], seen: Tensor, num_sinks: int, facing: int, scale: float, memory: Tensor, asking: Tensor | None,
    key: Tensor | None, decay: int, strength: int, rate: Tensor | None, delta: bool, eps: float, read_scale: float,
    weight: Tensor | None, gate: Tensor | None, matrix: Tensor | None, norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``ops.decode.step.decode_step``.

    Args:
        q: ``(B, H, 1, D)``.
        turned: the queries as they face the first ``facing`` slots.
        k: new keys ``(B, G, 1, D)``.
        v: new values ``(B, G, 1, E)``.
        new_gates: new gates ``(B, S, 1)``, two at most.
        k_slots: ``(B, G, C, D)``.
        v_slots: ``(B, G, C, E)``.
        gates: ``(B, S, C)`` each.
        seen: ``(B,)`` int64.
        num_sinks: leading slots that are never overwritten.
        facing: 0 if ``turned`` is ``q`` itself.
        scale: logit factor.
        memory: ``(B, S, D, E)`` float32, contiguous.
        asking: ``(B, H, 1, D)``, None if it is ``q``.
        key: ``(B, G, 1, D)``, None if it is the one in the slot.
        decay: which gate is the log decay, -1 for none.
        strength: which gate is the strength, -1 for none.
        rate: factor of the decay, or the log decay itself without a gate, ``(S,)``, None for one.
        delta: see ``StepRule``, as for the rest.
        eps: in the normalisation of keys and queries.
        read_scale: factor of the normalised queries.
        weight: ``(E,)``.
        gate: ``(B, H)``.
        matrix: ``(H, E, E)``.
        norm_eps: in the normalisation of the reading.
    """
    (b, h), (groups, slots, e), states = q.shape[:2], v_slots.shape[1:], memory.shape[1]
    given = (q, turned, q if asking is None else asking, k, v)
    q, turned, asking, k, v = (u if u.stride(-1) == 1 else u.contiguous() for u in given)
    key, rate, weight, gate, matrix = (None if u is None else u.contiguous() for u in (key, rate, weight, gate, matrix))
    assert k_slots.stride(3) == v_slots.stride(3) == 1 and memory.is_contiguous()
    options, size, parts = parts_of(q, k_slots, v_slots)
    repeats, tile = h // groups, min(_TILE, triton.next_power_of_2(e))
    largest, total = q.new_empty(2, b * groups, parts, repeats, dtype=torch.float32)
    partial = q.new_empty(b * groups, parts, repeats, e, dtype=torch.float32)
    reading, out, now = q.new_empty(b, h, 1, e, dtype=torch.float32), q.new_empty(b, h, 1, e), torch.empty_like(seen)
    early = early_launch(q)
    attending, held = b * groups * parts, [*gates, *[k_slots[..., 0]] * (2 - len(gates))]
    new = [*new_gates, *[k[..., 0]] * (2 - len(gates))]
    _attend_and_fold[(attending + b * states * triton.cdiv(e, tile),)](
        q, turned, k_slots, v_slots, seen, now, largest, total, partial, asking, q if key is None else key,
        held[decay], q if rate is None else rate, held[strength], memory, reading, slots, num_sinks, facing, scale,
        size, parts, attending, eps, read_scale, *q.stride()[:2], *turned.stride()[:2], *asking.stride()[:2],
        *k_slots.stride()[:3], *v_slots.stride()[:3], *held[decay].stride(), *held[strength].stride(),
        TURNED=facing > 0, S=states, TILE=tile, KEYED=key is not None, DECAYS=decay >= 0, RATED=rate is not None,
        WEIGHED=strength >= 0, DELTA=delta, EARLY=early["EARLY"], **options,
    )  # fmt: skip
    _finish[(b * h, triton.cdiv(e, _FINISH_TILE))](
        q, k, v, k_slots, v_slots, seen, now, largest, total, partial, reading, reading if weight is None else weight,
        reading if gate is None else gate, reading if matrix is None else matrix, out, *new, *held,
        slots, num_sinks, scale, parts, norm_eps, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *k_slots.stride()[:3], *v_slots.stride()[:3], *new[0].stride()[:2], *new[1].stride()[:2],
        *held[0].stride(), *held[1].stride(), H=h, R=repeats, D=options["D"], D_PAD=options["D_PAD"], E=e,
        E_PAD=options["E_PAD"], TILE=_FINISH_TILE, PARTS=min(128, triton.next_power_of_2(parts)), GATES=len(gates),
        S=states, RECALLS=matrix is not None, SCALED=weight is not None, GATED=gate is not None,
        num_warps=_FINISH_WARPS, **early,
    )  # fmt: skip
    return out, reading


@decode_step.register_fake
def _(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, torch.empty_like(out, dtype=torch.float32)
