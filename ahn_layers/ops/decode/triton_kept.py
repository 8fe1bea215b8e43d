"""What the kernels of a decode step do for tokens that are kept in slots: competition, attention, and moving.

In every key/value head the token that leaves the window competes with those in the slots by
``priority = score + rate * rank``. Each program that needs the outcome finds it by itself: the priorities are few.
A token that wins takes the slot of the one that it beats, so the slots are in no order; among equal ones the youngest
loses, by rank.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from .triton_decode import _store_part, _take_in
from .triton_turn import _load_halves, _turn_halves


@triton.jit
def _priority(score_at, log_rate_ptr, rate, g, rank, LEARNED: tl.constexpr):
    """Of the token that leaves."""
    if LEARNED:
        rate = tl.exp(tl.load(log_rate_ptr + g).to(tl.float32))
    return tl.load(score_at) + rate * rank.to(tl.float32)


@triton.jit
def _sortable(priority, rank):
    """A whole number that is the smaller, the sooner a token is lost: by priority, among equal ones the youngest."""
    bits = (tl.where(priority == priority, priority, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return high * 4294967296 + (4294967295 - rank)


@triton.jit
def _compete(
    priority_ptr, rank_ptr, filled, score_at, log_rate_ptr, rate, g, own_rank, leaves, row,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Which slot the leaving token takes, -1 for none; whose token is lost: a slot's, its own (SIZE), none (-1)."""
    most: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    least, slot = tl.full((), most, tl.int64), tl.full((), -1, tl.int32)
    for first in range(0, SIZE, BLOCK):
        n = first + tl.arange(0, BLOCK)
        # not asked first how many are filled: that would take as long again
        priority = tl.load(priority_ptr + row * SIZE + n, mask=n < SIZE, other=0.0)
        rank = tl.load(rank_ptr + row * SIZE + n, mask=n < SIZE, other=0)
        u = tl.where(n < tl.minimum(filled, SIZE), _sortable(priority, rank), most)
        low = tl.min(u, 0)
        at = tl.max(tl.where(u == low, n, -1), 0)
        slot = tl.where(low < least, at, slot)
        least = tl.minimum(low, least)
    own = _sortable(_priority(score_at, log_rate_ptr, rate, g, own_rank, LEARNED), own_rank)
    full = filled >= SIZE
    wins = least < own
    place = tl.where(full, tl.where(wins, slot, -1), filled.to(tl.int32))
    lost = tl.where(full, tl.where(wins, slot, SIZE), -1)
    return tl.where(leaves, place, -1), tl.where(leaves, lost, -1)


@triton.jit
def _take_in_kept(
    q_first, q_second, q_rest, first, second, rest, v, left, new, there, high, low, scale, largest, total, out,
    new_first, new_second, new_rest, new_v, new_left, COMPACT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A block of kept tokens, one of which may be the token that comes in."""
    is_new = new[:, None]
    if COMPACT:
        first, second = tl.where(is_new, new_first, first), tl.where(is_new, new_second, second)
        first, second = _turn_halves(first, second, tl.where(new, new_left, left)[:, None], high, low)
        logits = tl.dot(q_first, tl.trans(first), input_precision="ieee")
        logits = tl.dot(q_second, tl.trans(second), logits, input_precision="ieee")
        if REST:
            logits = tl.dot(q_rest, tl.trans(tl.where(is_new, new_rest, rest)), logits, input_precision="ieee")
    else:
        logits = tl.dot(q_rest, tl.trans(tl.where(is_new, new_rest, rest)), input_precision="ieee")
    logits = tl.where(there[None, :], logits * scale, float("-inf"))
    v = tl.where(is_new, new_v[None, :], tl.where(there[:, None], v, 0.0))
    return _take_in(logits, v, largest, total, out)


@triton.jit
def _attend_to_kept(
    q_ptr, k_ptr, v_ptr, left_ptr, window_k_at, window_v_at, freq_ptr, max_ptr, sum_ptr, out_ptr, place_ptr, lost_ptr,
    priority_ptr, rank_ptr, score_at, log_rate_ptr, rate, row, part, at, filled, refused, rank, leaves,
    first_channel, pairs, scale, part_size, q_b, q_h,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, COMPARED: tl.constexpr,
    LEARNED: tl.constexpr, COMPACT: tl.constexpr, INTERLEAVED: tl.constexpr, P_PAD: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one group to one part of its slots, the token that comes in included.

    The first tokens are on their way while it is found how many are filled, and who stays.
    """
    r, d, e, p = tl.arange(0, R_PAD), tl.arange(0, D_PAD), tl.arange(0, E_PAD), tl.arange(0, P_PAD)
    paired, alone = p < pairs, d < D
    if COMPACT:
        alone = alone & ((d < first_channel) | (d >= first_channel + 2 * pairs))
    if INTERLEAVED:
        a, b = first_channel + 2 * p, first_channel + 2 * p + 1
    else:
        a, b = first_channel + p, first_channel + p + pairs
    k_ptr, v_ptr, left_ptr = k_ptr + row * SIZE * D, v_ptr + row * SIZE * E, left_ptr + row * SIZE
    begin, held = part * part_size, tl.minimum(filled, SIZE).to(tl.int32)
    c = begin + tl.arange(0, BLOCK)
    there = (c < SIZE)[:, None]
    first, second, rest = _load_halves(k_ptr + c[:, None] * D, there, d, a, b, paired, alone, COMPACT, REST)
    v = tl.load(v_ptr + c[:, None] * E + e[None, :], mask=there & (e[None, :] < E), other=0.0)
    left, high, low = tl.zeros((BLOCK,), tl.int64), tl.zeros((1, P_PAD), tl.float32), tl.zeros((1, P_PAD), tl.float32)
    if COMPACT:
        left = tl.load(left_ptr + c, mask=c < SIZE, other=0)
        turns = tl.load(freq_ptr + p, mask=paired, other=0.0).to(tl.float64)[None, :] * 0.15915494309189535
        high = turns.to(tl.float32)
        low = (turns - high.to(tl.float64)).to(tl.float32)
    q_at = q_ptr + (row // G) * q_b + ((row % G) * R + r[:, None]) * q_h
    q_first, q_second, q_rest = _load_halves(q_at, (r < R)[:, None], d, a, b, paired, alone, COMPACT, REST)
    one = tl.full((1, 1), 1, tl.int1)
    new_first, new_second, new_rest = _load_halves(window_k_at, one, d, a, b, paired, alone, COMPACT, REST)
    new_v = tl.load(window_v_at + e, mask=e < E, other=0.0)
    place, lost = _compete(
        priority_ptr, rank_ptr, filled, score_at, log_rate_ptr, rate, row % G, rank, leaves, row,
        SIZE, COMPARED, LEARNED,
    )  # fmt: skip
    if part == 0:
        tl.store(place_ptr + row, place)
        tl.store(lost_ptr + row, lost)
    if COMPACT:
        q_first, q_second = _turn_halves(q_first, q_second, refused + tl.where(lost == SIZE, 1, 0), high, low)
    largest = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    out = tl.zeros((R_PAD, E_PAD), tl.float32)
    stop = tl.minimum(begin + part_size, tl.maximum(held, place + 1))
    for start in tl.range(begin, stop, BLOCK, num_stages=1):
        c = start + tl.arange(0, BLOCK)
        largest, total, out = _take_in_kept(
            q_first, q_second, q_rest, first, second, rest, v, left, c == place, c < stop, high, low, scale, largest,
            total, out, new_first, new_second, new_rest, new_v, refused, COMPACT, REST,
        )  # fmt: skip
        if start + BLOCK < stop:
            c += BLOCK
            there = (c < SIZE)[:, None]
            first, second, rest = _load_halves(k_ptr + c[:, None] * D, there, d, a, b, paired, alone, COMPACT, REST)
            v = tl.load(v_ptr + c[:, None] * E + e[None, :], mask=there & (e[None, :] < E), other=0.0)
            if COMPACT:
                left = tl.load(left_ptr + c, mask=c < SIZE, other=0)
    _store_part(max_ptr, sum_ptr, out_ptr, at, largest, total, out, r, e, R, E)


@triton.jit
def _move(from_at, to_at, where):
    """What leaves the window goes into its slot."""
    tl.store(to_at, tl.load(from_at, mask=where), mask=where)
