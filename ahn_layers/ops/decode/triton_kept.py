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
    own = _sortable(_priority(score_at, log_rate_ptr, rate, g, own_rank, LEARNED), own_rank)
    most: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    least, slot = tl.full((), most, tl.int64), tl.full((), -1, tl.int32)
    for first in range(0, SIZE, BLOCK):
        n = first + tl.arange(0, BLOCK)
        here = n < tl.minimum(filled, SIZE)
        priority = tl.load(priority_ptr + row * SIZE + n, mask=here, other=0.0)
        rank = tl.load(rank_ptr + row * SIZE + n, mask=here, other=0)
        u = tl.where(here, _sortable(priority, rank), most)
        low = tl.min(u, 0)
        at = tl.max(tl.where(u == low, n, -1), 0)
        slot = tl.where(low < least, at, slot)
        least = tl.minimum(low, least)
    full = filled >= SIZE
    wins = least < own
    place = tl.where(full, tl.where(wins, slot, -1), filled.to(tl.int32))
    lost = tl.where(full, tl.where(wins, slot, SIZE), -1)
    return tl.where(leaves, place, -1), tl.where(leaves, lost, -1)


@triton.jit
def _pairs(d, freq_ptr, first, pairs, INTERLEAVED: tl.constexpr):
    """Of each channel: the other one of its pair, its turns a position in two parts (0 if it has none), its sign."""
    at = d - first
    inside = (at >= 0) & (at < 2 * pairs)
    if INTERLEAVED:
        pair, leads = at // 2, at % 2 == 0
        other = d + tl.where(leads, 1, -1)
    else:
        leads = at < pairs
        pair = tl.where(leads, at, at - pairs)
        other = d + tl.where(leads, pairs, -pairs)
    turns = tl.load(freq_ptr + pair, mask=inside, other=0.0).to(tl.float64) * 0.15915494309189535
    high = turns.to(tl.float32)
    return tl.where(inside, other, d), high, (turns - high.to(tl.float64)).to(tl.float32), tl.where(leads, 1.0, -1.0)


@triton.jit
def _sine(turns):
    """Of at most a quarter turn, ``sin(2 pi x)``: its series to the 11th power, off by 2e-7."""
    x = turns * 6.283185307179586
    y = x * x
    u = 2.7557319e-06 - y * 2.5052108e-08
    u = y * (y * u - 1.9841270e-04) + 8.3333333e-03
    return x * (1.0 + y * (y * u - 1.6666667e-01))


@triton.jit
def _turn(u, other, sign, distance, high, low):
    """Channels turned back by a distance, at ``high + low`` turns a position, see ``rotary.turn_back``.

    The product is exact to a float32 of what is left of it without whole turns, for distances below 2^24.
    """
    steps = distance.to(tl.float32)
    product = steps * high
    turns = (product - tl.floor(product + 0.5)) + (tl.fma(steps, high, -product) + steps * low)
    far = tl.abs(turns) > 0.25
    sine = _sine(tl.where(far, tl.where(turns > 0, 0.5, -0.5) - turns, turns))
    return u.to(tl.float32) * _sine(0.25 - tl.abs(turns)) + other.to(tl.float32) * (sine * sign)


@triton.jit
def _load_kept(
    k_ptr, v_ptr, left_ptr, c, stop, other, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    COMPACT: tl.constexpr,
):  # fmt: skip
    """Of the tokens in slots ``c``: keys, the other channels of their pairs, values, the numbers left out."""
    d, e, held = tl.arange(0, D_PAD), tl.arange(0, E_PAD), c < stop
    k_at, keys = k_ptr + c[:, None] * D, held[:, None] & (d[None, :] < D)
    k = tl.load(k_at + d[None, :], mask=keys, other=0.0)
    k_other, left = k, tl.zeros_like(c).to(tl.int64)
    if COMPACT:
        k_other = tl.load(k_at + other[None, :], mask=keys, other=0.0)
        left = tl.load(left_ptr + c, mask=held, other=0)
    v = tl.load(v_ptr + c[:, None] * E + e[None, :], mask=held[:, None] & (e[None, :] < E), other=0.0)
    return k, k_other, v, left


@triton.jit
def _attend_to_kept(
    q_ptr, k_ptr, v_ptr, left_ptr, window_k_at, window_v_at, freq_ptr, max_ptr, sum_ptr, out_ptr, place_ptr, lost_ptr,
    priority_ptr, rank_ptr, score_at, log_rate_ptr, rate, row, part, at, filled, refused_before, rank, leaves,
    first_channel, pairs, scale, part_size, q_b, q_h,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, COMPARED: tl.constexpr,
    LEARNED: tl.constexpr, COMPACT: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one group to one part of its slots, the token that comes in included.

    The first tokens are on their way while the outcome of the competition is found.
    """
    b, g = row // G, row % G
    r, d, e = tl.arange(0, R_PAD), tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    other, high, low, sign = d, tl.zeros((D_PAD,), tl.float32), tl.zeros((D_PAD,), tl.float32), d
    if COMPACT:
        other, high, low, sign = _pairs(d, freq_ptr, first_channel, pairs, INTERLEAVED)
    k_ptr, v_ptr, left_ptr = k_ptr + row * SIZE * D, v_ptr + row * SIZE * E, left_ptr + row * SIZE
    start, held = part * part_size, tl.minimum(filled, SIZE).to(tl.int32)
    c = start + tl.arange(0, BLOCK)
    k, k_other, v, left = _load_kept(k_ptr, v_ptr, left_ptr, c, held, other, D, D_PAD, E, E_PAD, COMPACT)
    inside = (r[:, None] < R) & (d[None, :] < D)
    q_at = q_ptr + b * q_b + (g * R + r[:, None]) * q_h
    q, q_other = tl.load(q_at + d[None, :], mask=inside, other=0.0), tl.load(q_at + other[None, :], mask=inside, other=0.0)
    new_k, new_v = tl.load(window_k_at + d, mask=d < D, other=0.0), tl.load(window_v_at + e, mask=e < E, other=0.0)
    new_other = tl.load(window_k_at + other, mask=d < D, other=0.0)
    place, lost = _compete(
        priority_ptr, rank_ptr, filled, score_at, log_rate_ptr, rate, g, rank, leaves, row, SIZE, COMPARED, LEARNED
    )
    if part == 0:
        tl.store(place_ptr + row, place)
        tl.store(lost_ptr + row, lost)
    if COMPACT:
        refused = refused_before + tl.where(lost == SIZE, 1, 0)
        q = _turn(q, q_other, sign[None, :], refused, high[None, :], low[None, :]).to(q.dtype)
    largest = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    out = tl.zeros((R_PAD, E_PAD), tl.float32)
    stop = tl.minimum(start + part_size, tl.maximum(held, place + 1))
    for first in range(start, stop, BLOCK):
        c = first + tl.arange(0, BLOCK)
        if first > start:
            k, k_other, v, left = _load_kept(k_ptr, v_ptr, left_ptr, c, held, other, D, D_PAD, E, E_PAD, COMPACT)
        new = c == place
        k = tl.where(new[:, None], new_k[None, :], k)
        v = tl.where(new[:, None], new_v[None, :], v)
        if COMPACT:
            k_other = tl.where(new[:, None], new_other[None, :], k_other)
            left = tl.where(new, refused_before, left)
            k = _turn(k, k_other, sign[None, :], left[:, None], high[None, :], low[None, :]).to(k.dtype)
        logits = tl.where((c < stop)[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        largest, total, out = _take_in(logits, v, largest, total, out)
    _store_part(max_ptr, sum_ptr, out_ptr, at, largest, total, out, r, e, R, E)


@triton.jit
def _move(from_at, to_at, where):
    """What leaves the window goes into its slot."""
    tl.store(to_at, tl.load(from_at, mask=where), mask=where)
