"""Triton kernels for a whole decode step of a layer in two launches.

1. *Attend and fold*: some programs attend to a part of the slots each, all but the one whose token leaves; others fold
   that token into a tile of the memory and read it; with tokens kept beside the window, others attend to these and find
   the new token's score. None waits for another: the memory costs no time of its own.
2. *Finish*: some programs let the new token join the parts of the attention; what was read is normalised, gated,
   multiplied and added. Others put the new token into its slot, and what leaves that into another. Since Hopper it
   starts while the first one ends.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import early_launch, operator
from .triton_decode import _attend, parts_of
from .triton_finish import _finish
from .triton_fold import _fold_tile, _slot
from .triton_kept import _attend_to_kept
from .triton_score import _score_part

_TILE = 32
"""Channels of the memory's values that a program folds and reads."""
_KEPT_BLOCK, _KEPT_PARTS = 16, 32
"""Kept tokens that a program loads at a time, and the most parts that they are cut in."""
_SCORE_UNITS, _SCORE_PARTS, _SCORE_BLOCK = 4, 32, 2048
"""Of a learned score: the least hidden units of a program, the most programs, and the channels loaded at a time."""
_FINISH_TILE, _FINISH_WARPS = 16, (1, 2)
"""Channels of the output that a program of the second launch makes, and its warps, without kept tokens and with."""


@Kernel
@triton.jit
def _attend_and_fold(
    q_ptr, turned_ptr, k_ptr, v_ptr, seen_ptr, now_ptr, max_ptr, sum_ptr, part_ptr,
    asking_ptr, key_ptr, decay_ptr, rate_ptr, strength_ptr, memory_ptr, reading_ptr,
    kept_k_ptr, kept_v_ptr, kept_decay_ptr, kept_strength_ptr, filled_ptr, folded_ptr, priority_ptr, kept_rank_ptr,
    left_ptr, refused_ptr, score_ptr, log_rate_ptr, freq_ptr, place_ptr, lost_ptr,
    x_ptr, new_v_ptr, up_ptr, up_bias_ptr, up_v_ptr, down_ptr, direct_ptr, direct_bias_ptr, scored_ptr,
    slots, num_sinks, facing, scale, part_size, parts, all_parts, kept_size, kept_parts, keeping, scoring, attending,
    first_channel, pairs, slot_rate, eps, read_scale, score_eps,
    q_b, q_h, t_b, t_h, a_b, a_h, k_b, k_g, k_c, v_b, v_g, v_c, d_b, d_s, d_c, s_b, s_s, s_c, c_b, c_g, c_c, n_b, n_g,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
    KEYED: tl.constexpr, DECAYS: tl.constexpr, RATED: tl.constexpr, WEIGHED: tl.constexpr, DELTA: tl.constexpr,
    SIZE: tl.constexpr, KEPT_BLOCK: tl.constexpr, COMPARED: tl.constexpr, LEARNED: tl.constexpr,
    COMPACT: tl.constexpr, HIDDEN: tl.constexpr, INTERLEAVED: tl.constexpr, P_PAD: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr, INNER: tl.constexpr,
    UNITS: tl.constexpr, SCORE_PARTS: tl.constexpr, SCORE_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The programs that take longest begin first: for kept tokens, for the score, for the window, for the memory."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if (program >= keeping + scoring) & (program < keeping + scoring + attending):
        at = program - (keeping + scoring)
        row, part = (at // parts).to(tl.int64), at % parts
        seen = tl.load(seen_ptr + row // G)
        if (row % G == 0) & (part == 0):
            tl.store(now_ptr + row // G, seen + 1)
        _attend(
            q_ptr, turned_ptr, k_ptr, v_ptr, max_ptr, sum_ptr, part_ptr, row, part, row * all_parts + part,
            tl.minimum(slots, seen).to(tl.int32), _slot(seen, slots, num_sinks).to(tl.int32), facing, scale, part_size,
            q_b, q_h, t_b, t_h, k_b, k_g, k_c, v_b, v_g, v_c, G, R, R_PAD, D, D_PAD, E, E_PAD, BLOCK, TURNED,
        )  # fmt: skip
    elif program >= keeping + scoring:
        tiles: tl.constexpr = (E + TILE - 1) // TILE
        at = program - (keeping + scoring + attending)
        index = (at // tiles).to(tl.int64)
        b, s = index // S, index % S
        seen = tl.load(seen_ptr + b)
        _fold_tile(
            asking_ptr, k_ptr, v_ptr, decay_ptr, strength_ptr, kept_k_ptr, kept_v_ptr, kept_decay_ptr,
            kept_strength_ptr, filled_ptr, folded_ptr, priority_ptr, kept_rank_ptr, score_ptr, log_rate_ptr, freq_ptr,
            key_ptr, rate_ptr, memory_ptr, reading_ptr, b, s, at % tiles, _slot(seen, slots, num_sinks),
            seen - (slots - num_sinks), seen >= slots, first_channel, pairs, slot_rate, eps, read_scale,
            a_b, a_h, k_b, k_g, k_c, v_b, v_g, v_c, d_b, d_s, d_c, s_b, s_s, s_c, c_b, c_g, c_c,
            G, R, D, D_PAD, E, S, TILE, KEYED, DECAYS, RATED, WEIGHED, DELTA, SIZE, COMPARED, LEARNED, HIDDEN,
            INTERLEAVED,
        )  # fmt: skip
    elif program >= keeping:
        if SCORE_PARTS > 0:
            each: tl.constexpr = SCORE_PARTS - 1 + (G + UNITS - 1) // UNITS
            at = program - keeping
            _score_part(
                x_ptr, new_v_ptr, up_ptr, up_bias_ptr, up_v_ptr, down_ptr, direct_ptr, direct_bias_ptr, scored_ptr,
                (at // each).to(tl.int64), at % each, score_eps, n_b, n_g, G, N, E, E_PAD, INNER, UNITS, SCORE_PARTS,
                SCORE_BLOCK,
            )  # fmt: skip
    elif SIZE > 0:
        row, part = (program // kept_parts).to(tl.int64), program % kept_parts
        b, g = row // G, row % G
        seen, filled, refused = tl.load(seen_ptr + b), tl.load(filled_ptr + row), tl.full((), 0, tl.int64)
        if COMPACT:
            refused = tl.load(refused_ptr + row)
        slot = _slot(seen, slots, num_sinks)
        _attend_to_kept(
            q_ptr, kept_k_ptr, kept_v_ptr, left_ptr, k_ptr + b * k_b + g * k_g + slot * k_c,
            v_ptr + b * v_b + g * v_g + slot * v_c, freq_ptr, max_ptr, sum_ptr, part_ptr, place_ptr, lost_ptr,
            priority_ptr, kept_rank_ptr, score_ptr + b * c_b + g * c_g + slot * c_c, log_rate_ptr, slot_rate,
            row, part, row * all_parts + parts + part, filled, refused, seen - (slots - num_sinks), seen >= slots,
            first_channel, pairs, scale, kept_size, q_b, q_h,
            G, R, R_PAD, D, D_PAD, E, E_PAD, KEPT_BLOCK, SIZE, COMPARED, LEARNED, COMPACT, INTERLEAVED, P_PAD, REST,
        )  # fmt: skip


@operator("ahn_layers::decode_step", mutates_args=("k_slots", "v_slots", "gates", "seen", "memory", "kept"))
def decode_step(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, new_gates: list[Tensor], k_slots: Tensor, v_slots: Tensor,
    gates: list[Tensor], seen: Tensor, num_sinks: int, facing: int, scale: float, memory: Tensor | None,
    asking: Tensor | None, key: Tensor | None, decay: int, strength: int, rate: Tensor | None, delta: bool, eps: float,
    read_scale: float, weight: Tensor | None, gate: Tensor | None, matrix: Tensor | None, norm_eps: float,
    kept: list[Tensor], score: Tensor | None, x: Tensor | None, weights: list[Tensor], log_rate: Tensor | None,
    slot_rate: float, scored: bool, compact: bool, hidden: bool, freq: Tensor | None, first_channel: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``ops.decode.step.decode_step``, ``StepRule`` and ``KeptSlots``, whose fields these are.

    ``turned`` are the queries as they face the first ``facing`` slots, 0 if they are ``q`` itself. ``decay`` and
    ``strength`` are numbers of gates, of which there are two at most, -1 for none. ``kept`` is contiguous: keys
    ``(B, G, N, D)``, values, filled and folded ``(B, G)``, priorities, ranks; if ``compact``, the numbers left out and
    refused; if ``scored``, scores and those in the window; gates. ``score`` is that of the new token if ``scored``,
    else of the one that leaves, ``(B, G, 1)`` float32; it is None where ``x`` and ``weights`` say how it is computed,
    in the order of ``ScoreWeights``.
    """
    (b, h), (groups, slots, e) = q.shape[:2], v_slots.shape[1:]
    states = 1 if memory is None else memory.shape[1]
    given = (q, turned, q if asking is None else asking, k, v)
    q, turned, asking, k, v = (u if u.stride(-1) == 1 else u.contiguous() for u in given)
    key, rate, weight, gate, matrix = (None if u is None else u.contiguous() for u in (key, rate, weight, gate, matrix))
    assert k_slots.stride(3) == v_slots.stride(3) == 1 and (memory is None or memory.is_contiguous())
    options, size, parts = parts_of(q, k_slots, v_slots)
    repeats, tile = h // groups, min(_TILE, triton.next_power_of_2(e))
    number, rows, rest = kept[0].shape[2] if kept else 0, b * groups, list(kept)
    none = seen  # stands for what there is not
    kept_k, kept_v, filled, folded, priority, ranks = rest[:6] if kept else (none,) * 6
    left_out, refused = rest[6:8] if compact else (none, none)
    kept_score, scores = rest[-2 - len(gates) :][:2] if scored else (none, none if score is None else score)
    kept_gates = [*(rest[len(rest) - len(gates) :] if kept else gates), none, none]
    kept_size = triton.cdiv(max(number, 1), min(_KEPT_PARTS, parts) * _KEPT_BLOCK) * _KEPT_BLOCK
    kept_parts = triton.cdiv(number, kept_size)
    all_parts = parts + kept_parts
    largest, total = q.new_empty(2, rows, all_parts, repeats, dtype=torch.float32)
    partial = q.new_empty(rows, all_parts, repeats, e, dtype=torch.float32)
    place, lost = seen.new_empty(2, rows, dtype=torch.int32)
    reading, out, now = q.new_empty(b, h, 1, e, dtype=torch.float32), q.new_empty(b, h, 1, e), torch.empty_like(seen)
    early = early_launch(q)
    attending, keeping, held = rows * parts, rows * kept_parts, [*gates, *[k_slots[..., 0]] * (2 - len(gates))]
    x, *weights = (u.contiguous() for u in ([] if x is None else [x]) + weights) if weights else [none] * 7
    inner, width = (0, 0) if weights[0] is none else weights[0].shape
    units = max(_SCORE_UNITS, triton.next_power_of_2(triton.cdiv(inner, _SCORE_PARTS)))
    score_parts, scoring, score_eps = 0, 0, 0.0
    if inner:
        score_parts, score_eps = triton.cdiv(inner, units) + 1, torch.finfo(x.dtype).eps
        scoring = b * (score_parts - 1 + triton.cdiv(groups, units))
    found = seen.new_empty(rows, score_parts, dtype=torch.float32) if inner else none
    folding = 0 if memory is None else b * states * triton.cdiv(e, tile)
    new = [*new_gates, *[k[..., 0]] * (2 - len(gates))]
    score_strides = (*scores.stride()[:2], scores.stride(2) if scored else 0) if kept else (0, 0, 0)
    shared = {"SIZE": number, "LEARNED": log_rate is not None, "COMPACT": compact, "SCORE_PARTS": score_parts}
    turning, pairs = (q, 0) if freq is None else (freq, len(freq))
    learned = q if log_rate is None else log_rate
    _attend_and_fold[(keeping + scoring + folding + attending,)](
        q, turned, k_slots, v_slots, seen, now, largest, total, partial, asking, q if key is None else key,
        held[decay], q if rate is None else rate, held[strength], reading if memory is None else memory, reading,
        kept_k, kept_v, kept_gates[decay], kept_gates[strength], filled, folded, priority, ranks, left_out, refused,
        scores, learned, turning, place, lost, x, v, *weights, found,
        slots, num_sinks, facing, scale, size, parts, all_parts, kept_size, max(kept_parts, 1), keeping, scoring,
        attending, first_channel, pairs, slot_rate, eps, read_scale, score_eps,
        *q.stride()[:2], *turned.stride()[:2], *asking.stride()[:2],
        *k_slots.stride()[:3], *v_slots.stride()[:3], *held[decay].stride(), *held[strength].stride(), *score_strides,
        *v.stride()[:2],
        TURNED=facing > 0, S=states, TILE=tile, KEYED=key is not None, DECAYS=decay >= 0, RATED=rate is not None,
        WEIGHED=strength >= 0, DELTA=delta, KEPT_BLOCK=_KEPT_BLOCK,
        COMPARED=min(1024, triton.next_power_of_2(max(number, 1))),
        HIDDEN=hidden, INTERLEAVED=interleaved, P_PAD=max(16, triton.next_power_of_2(pairs)),
        REST=not compact or 2 * pairs < options["D"], N=width, INNER=inner, UNITS=units, SCORE_BLOCK=_SCORE_BLOCK,
        EARLY=early["EARLY"], **shared, **options,
    )  # fmt: skip
    _finish[(b * h, triton.cdiv(e, _FINISH_TILE) + 1)](
        q, k, v, k_slots, v_slots, seen, now, largest, total, partial, reading, reading if weight is None else weight,
        reading if gate is None else gate, reading if matrix is None else matrix, out, *new, *held,
        kept_k, kept_v, *kept_gates[:2], filled, folded, priority, ranks, left_out, refused, kept_score, scores,
        found if score is None else score, learned, place, lost,
        slots, num_sinks, scale, all_parts, slot_rate, norm_eps, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *k_slots.stride()[:3], *v_slots.stride()[:3], *new[0].stride()[:2], *new[1].stride()[:2],
        *held[0].stride(), *held[1].stride(), *((0, 0) if score is None else score.stride()[:2]), *score_strides,
        H=h, R=repeats, D=options["D"], D_PAD=options["D_PAD"], E=e,
        E_PAD=options["E_PAD"], TILE=_FINISH_TILE, PARTS=min(128, triton.next_power_of_2(all_parts)), GATES=len(gates),
        S=states, RECALLS=matrix is not None, SCALED=weight is not None, GATED=gate is not None, SCORED=scored,
        num_warps=_FINISH_WARPS[bool(kept)], **shared, **early,
    )  # fmt: skip
    return out, reading


@decode_step.register_fake
def _(q: Tensor, turned: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, torch.empty_like(out, dtype=torch.float32)
