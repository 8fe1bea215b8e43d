"""The second launch of a decode step: the new token joins the attention and takes its slot, the memory is added."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from ..ahead import Kernel
from .triton_decode import _join
from .triton_fold import _slot
from .triton_kept import _move, _priority


@Kernel
@triton.jit
def _finish(
    q_ptr, k_ptr, v_ptr, k_slots_ptr, v_slots_ptr, seen_ptr, now_ptr, max_ptr, sum_ptr, part_ptr,
    reading_ptr, weight_ptr, gate_ptr, matrix_ptr, out_ptr, new0_ptr, new1_ptr, gates0_ptr, gates1_ptr,
    kept_k_ptr, kept_v_ptr, kept0_ptr, kept1_ptr, filled_ptr, folded_ptr, priority_ptr, kept_rank_ptr, left_ptr,
    refused_ptr, kept_score_ptr, score_ptr, new_score_ptr, log_rate_ptr, place_ptr, lost_ptr,
    slots, num_sinks, scale, parts, slot_rate, eps, q_b, q_h, k_b, k_g, v_b, v_g, ks_b, ks_g, ks_c, vs_b, vs_g, vs_c,
    n0_b, n0_s, n1_b, n1_s, g0_b, g0_s, g0_c, g1_b, g1_s, g1_c, ns_b, ns_g, c_b, c_g, c_c,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, GATES: tl.constexpr, S: tl.constexpr,
    RECALLS: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr, SIZE: tl.constexpr, LEARNED: tl.constexpr,
    SCORED: tl.constexpr, COMPACT: tl.constexpr, SCORE_PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, g, d = head // H, head % H, head % H // R, tl.arange(0, D_PAD)
    if tile < (E + TILE - 1) // TILE:
        e = tile * TILE + tl.arange(0, TILE)
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
        one = tl.full((), 1.0, tl.float32)
        if RECALLS:
            r = tl.load(reading_ptr + head * E + i, mask=i < E, other=0.0)
        out = _join(max_ptr, sum_ptr, part_ptr, head, e, parts, logit, one, v.to(tl.float32), R, E, TILE, PARTS)
        if RECALLS:
            out += tl.sum(matrix * (r * tl.rsqrt(tl.sum(r * r, 0) / E + eps))[:, None], 0)
        tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    else:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        now, row = tl.load(now_ptr + b), b * (H // R) + g
        slot, place = _slot(now - 1, slots, num_sinks), tl.full((), -1, tl.int32)
        if SIZE > 0:
            place = tl.load(place_ptr + row)
        moves = place >= 0
        if h % R == 0:
            e = tl.arange(0, E_PAD)
            value_at = v_slots_ptr + b * vs_b + g * vs_g + slot * vs_c + e
            key_at = k_slots_ptr + b * ks_b + g * ks_g + slot * ks_c + d
            if SIZE > 0:
                to, rank = row * SIZE + place, now - 1 - (slots - num_sinks)
                _move(key_at, kept_k_ptr + to * D + d, d < tl.where(moves, D, 0))
                _move(value_at, kept_v_ptr + to * E + e, e < tl.where(moves, E, 0))
                score_at, lost = score_ptr + b * c_b + g * c_g + slot * c_c, tl.load(lost_ptr + row)
                tl.store(priority_ptr + to, _priority(score_at, log_rate_ptr, slot_rate, g, rank, LEARNED), mask=moves)
                tl.store(kept_rank_ptr + to, rank, mask=moves)
                tl.store(filled_ptr + row, tl.load(filled_ptr + row) + tl.where(moves & (lost < 0), 1, 0))
                tl.store(folded_ptr + row, tl.full((), 1, tl.int1), mask=lost >= 0)
                if COMPACT:
                    refused = tl.load(refused_ptr + row)
                    tl.store(left_ptr + to, refused, mask=moves)
                    tl.store(refused_ptr + row, refused + tl.where(lost == SIZE, 1, 0))
                if SCORED:
                    _move(score_at, kept_score_ptr + to, moves)
                    if SCORE_PARTS > 0:
                        n = tl.arange(0, 64)
                        found = tl.load(new_score_ptr + row * SCORE_PARTS + n, mask=n < SCORE_PARTS, other=0.0)
                        tl.store(score_at, tl.sum(found, 0))
                    else:
                        tl.store(score_at, tl.load(new_score_ptr + b * ns_b + g * ns_g))
            tl.store(key_at, tl.load(k_ptr + b * k_b + g * k_g + d, mask=d < D), mask=d < D)
            tl.store(value_at, tl.load(v_ptr + b * v_b + g * v_g + e, mask=e < E), mask=e < E)
        if h == 0:
            tl.store(seen_ptr + b, now)
        if h < S:
            if SIZE > 0:
                place = tl.load(place_ptr + b * (H // R) + h * (H // R) // S)
            to = (b * S + h) * SIZE + place
            if GATES > 0:
                at = gates0_ptr + b * g0_b + h * g0_s + slot * g0_c
                if SIZE > 0:
                    _move(at, kept0_ptr + to, place >= 0)
                tl.store(at, tl.load(new0_ptr + b * n0_b + h * n0_s))
            if GATES > 1:
                at = gates1_ptr + b * g1_b + h * g1_s + slot * g1_c
                if SIZE > 0:
                    _move(at, kept1_ptr + to, place >= 0)
                tl.store(at, tl.load(new1_ptr + b * n1_b + h * n1_s))
