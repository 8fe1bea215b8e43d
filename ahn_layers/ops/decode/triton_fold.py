"""What a decode step's kernel does for the memory: a lost token folded, and the queries' readings."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from .triton_kept import _compete
from .triton_turn import _pairs, _turn


@triton.jit
def _slot(seen, slots, num_sinks):
    """Where the token of this rank goes, as ``Window.slot``."""
    return tl.where(seen < num_sinks, seen, num_sinks + (seen - num_sinks) % (slots - num_sinks))


@triton.jit
def _normal(u, eps, scale):
    """``scale * u / sqrt(sum(u^2) + eps)`` of a vector."""
    return u * (scale * tl.rsqrt(tl.sum(u * u, 0) + eps))


@triton.jit
def _fold_tile(
    asking_ptr, k_ptr, v_ptr, decay_ptr, strength_ptr, kept_k_ptr, kept_v_ptr, kept_decay_ptr, kept_strength_ptr,
    filled_ptr, folded_ptr, priority_ptr, kept_rank_ptr, score_ptr, log_rate_ptr, freq_ptr, key_ptr, rate_ptr,
    memory_ptr, reading_ptr, b, s, tile, slot, rank, leaves, first_channel, pairs, slot_rate, eps, read_scale,
    a_b, a_h, k_b, k_g, k_c, v_b, v_g, v_c, d_b, d_s, d_c, s_b, s_s, s_c, c_b, c_g, c_c,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
    TILE: tl.constexpr, KEYED: tl.constexpr, DECAYS: tl.constexpr, RATED: tl.constexpr, WEIGHED: tl.constexpr,
    DELTA: tl.constexpr, SIZE: tl.constexpr, COMPARED: tl.constexpr, LEARNED: tl.constexpr, HIDDEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some channels of the memory: the lost token folded, then read; zeros where nothing has been folded.

    What is lost is the token in the window's ``slot``, or one of those kept. State and first query are on their way
    while that is found.
    """
    d, e, g = tl.arange(0, D_PAD), tile * TILE + tl.arange(0, TILE), s * G // S
    queries: tl.constexpr = G * R // S
    q_at, read_at = asking_ptr + b * a_b + s * queries * a_h + d, reading_ptr + (b * S + s) * queries * E + e
    row, loses, reads = b * G + g, leaves, leaves
    if SIZE > 0:
        filled = tl.load(filled_ptr + row)
        loses = leaves & (filled >= SIZE)
        reads = loses | (tl.load(folded_ptr + row) != 0)
    if reads:
        inside = (d[:, None] < D) & (e[None, :] < E)
        state_at = memory_ptr + (b * S + s) * D * E + d[:, None] * E + e[None, :]
        state = tl.load(state_at, mask=inside, other=0.0)
        q = tl.load(q_at, mask=d < D, other=0.0)
        if loses:
            key_at, value_at = k_ptr + b * k_b + g * k_g + slot * k_c, v_ptr + b * v_b + g * v_g + slot * v_c
            if KEYED:
                key_at = key_ptr + row * D
            k = tl.load(key_at + d, mask=d < D, other=0.0).to(tl.float32)
            v = tl.load(value_at + e, mask=e < E, other=0.0).to(tl.float32)
            if SIZE > 0:
                _, lost = _compete(
                    priority_ptr, kept_rank_ptr, filled, score_ptr + b * c_b + g * c_g + slot * c_c, log_rate_ptr,
                    slot_rate, g, rank, leaves, row, SIZE, COMPARED, LEARNED,
                )  # fmt: skip
                held, beaten = tl.minimum(lost, SIZE - 1), lost < SIZE
                at = row * SIZE + held
                kept_k = tl.load(kept_k_ptr + at * D + d, mask=d < D, other=0.0).to(tl.float32)
                kept_v = tl.load(kept_v_ptr + at * E + e, mask=e < E, other=0.0).to(tl.float32)
                if HIDDEN:
                    other, high, low, sign = _pairs(d, freq_ptr, first_channel, pairs, INTERLEAVED)
                    own_other = tl.load(key_at + other, mask=d < D, other=0.0).to(tl.float32)
                    kept_other = tl.load(kept_k_ptr + at * D + other, mask=d < D, other=0.0).to(tl.float32)
                    rank = tl.where(beaten, tl.load(kept_rank_ptr + at), rank)
                k, v = tl.where(beaten, kept_k, k), tl.where(beaten, kept_v, v)
                if HIDDEN:
                    k = _turn(k, tl.where(beaten, kept_other, own_other), sign, rank, high, low)
                    k = k.to(k_ptr.dtype.element_ty).to(tl.float32)
            k = _normal(k, eps, 1.0)
            if DECAYS:
                decay = tl.load(decay_ptr + b * d_b + s * d_s + slot * d_c).to(tl.float32)
                if SIZE > 0:
                    kept_decay = tl.load(kept_decay_ptr + (b * S + s) * SIZE + held).to(tl.float32)
                    decay = tl.where(beaten, kept_decay, decay)
                if RATED:
                    decay *= tl.load(rate_ptr + s).to(tl.float32)
                state = state * tl.exp(decay)
            elif RATED:  # the rate itself is the log decay of every token
                state = state * tl.exp(tl.load(rate_ptr + s).to(tl.float32))
            if DELTA:
                v -= tl.sum(state * k[:, None], 0)
            if WEIGHED:
                strength = tl.load(strength_ptr + b * s_b + s * s_s + slot * s_c).to(tl.float32)
                if SIZE > 0:
                    kept_strength = tl.load(kept_strength_ptr + (b * S + s) * SIZE + held).to(tl.float32)
                    strength = tl.where(beaten, kept_strength, strength)
                v *= strength
            state += k[:, None] * v[None, :]
        for r in range(queries):
            read = tl.sum(state * _normal(q.to(tl.float32), eps, read_scale)[:, None], 0)
            tl.store(read_at + r * E, read, mask=e < E)
            q = tl.load(q_at + (r + 1) * a_h, mask=d < tl.where(r + 1 < queries, D, 0), other=0.0)
        tl.store(state_at, state, mask=inside & (e[None, :] < tl.where(loses, E, 0)))
    else:
        for r in range(queries):
            tl.store(read_at + r * E, tl.zeros((TILE,), tl.float32), mask=e < E)
