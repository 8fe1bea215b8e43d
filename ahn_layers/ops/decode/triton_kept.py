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
def _compete(priority_ptr, rank_ptr, filled, own, leaves, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which slot the leaving token takes, -1 for none; whose token is lost: a slot's, its own (SIZE), none (-1).

    ``own`` is what ``_sortable`` says of the leaving token.
    """
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
def _attend_to_kept(
    q_ptr, k_ptr, v_ptr, left_ptr, window_k_at, window_v_at, freq_ptr, max_ptr, sum_ptr, out_ptr, row, part, at,
    filled, place, refused_before, refused, first_channel, pairs, scale, part_size, q_b, q_h,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, COMPACT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one group to one part of its slots, the token that comes in included."""
    b, g = (row // G).to(tl.int64), (row % G).to(tl.int64)
    r, d, e = tl.arange(0, R_PAD), tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    inside = (r[:, None] < R) & (d[None, :] < D)
    q_at = q_ptr + b * q_b + (g * R + r[:, None]) * q_h
    q = tl.load(q_at + d[None, :], mask=inside, other=0.0)
    if COMPACT:
        other, high, low, sign = _pairs(d, freq_ptr, first_channel, pairs, INTERLEAVED)
        q_other = tl.load(q_at + other[None, :], mask=inside, other=0.0)
        q = _turn(q, q_other, sign[None, :], refused, high[None, :], low[None, :]).to(q.dtype)
    largest = tl.full((R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((R_PAD,), tl.float32)
    out = tl.zeros((R_PAD, E_PAD), tl.float32)
    start = part * part_size
    stop = tl.minimum(start + part_size, tl.maximum(filled.to(tl.int32), place + 1))
    base = row.to(tl.int64) * SIZE
    for first in range(start, stop, BLOCK):
        c = first + tl.arange(0, BLOCK)
        held, new = (c < stop) & (c != place), (c < stop) & (c == place)
        k_at = k_ptr + (base + c[:, None]) * D
        keys, news = held[:, None] & (d[None, :] < D), new[:, None] & (d[None, :] < D)
        k = tl.load(k_at + d[None, :], mask=keys, other=0.0)
        k += tl.load(window_k_at + d[None, :] + 0 * c[:, None], mask=news, other=0.0)
        if COMPACT:
            k_other = tl.load(k_at + other[None, :], mask=keys, other=0.0)
            k_other += tl.load(window_k_at + other[None, :] + 0 * c[:, None], mask=news, other=0.0)
            left = tl.where(new, refused_before, tl.load(left_ptr + base + c, mask=held, other=0))
            k = _turn(k, k_other, sign[None, :], left[:, None], high[None, :], low[None, :]).to(k.dtype)
        values, news = held[:, None] & (e[None, :] < E), new[:, None] & (e[None, :] < E)
        v = tl.load(v_ptr + (base + c[:, None]) * E + e[None, :], mask=values, other=0.0)
        v += tl.load(window_v_at + e[None, :] + 0 * c[:, None], mask=news, other=0.0)
        logits = tl.where((c < stop)[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        largest, total, out = _take_in(logits, v, largest, total, out)
    _store_part(max_ptr, sum_ptr, out_ptr, at, largest, total, out, r, e, R, E)


@triton.jit
def _move(from_at, to_at, where):
    """What leaves the window goes into its slot."""
    tl.store(to_at, tl.load(from_at, mask=where), mask=where)
