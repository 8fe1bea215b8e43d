"""Rotation in the kernels of a decode step: vectors turned back by a distance, as ``rotary.turn_back`` does it."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


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
def _angle(distance, high, low):
    """Cosine and sine of a distance at ``high + low`` turns a position.

    The product is exact to a float32 of what is left of it without whole turns, for distances below 2^24.
    """
    steps = distance.to(tl.float32)
    product = steps * high
    turns = (product - tl.floor(product + 0.5)) + (tl.fma(steps, high, -product) + steps * low)
    far = tl.abs(turns) > 0.25
    return _sine(0.25 - tl.abs(turns)), _sine(tl.where(far, tl.where(turns > 0, 0.5, -0.5) - turns, turns))


@triton.jit
def _turn(u, other, sign, distance, high, low):
    """Channels turned back by a distance, see ``rotary.turn_back``."""
    cosine, sine = _angle(distance, high, low)
    return u.to(tl.float32) * cosine + other.to(tl.float32) * (sine * sign)


@triton.jit
def _load_halves(at, there, d, a, b, paired, alone, COMPACT: tl.constexpr, REST: tl.constexpr):
    """Of vectors, their channels ``a`` and ``b`` that are turned with each other, and those that are not.

    Where one of them does not exist, another stands in its place.
    """
    if COMPACT:
        first = tl.load(at + a[None, :], mask=there & paired[None, :], other=0.0)
        second = tl.load(at + b[None, :], mask=there & paired[None, :], other=0.0)
        rest = first
        if REST:
            rest = tl.load(at + d[None, :], mask=there & alone[None, :], other=0.0)
    else:
        rest = tl.load(at + d[None, :], mask=there & alone[None, :], other=0.0)
        first, second = rest, rest
    return first, second, rest


@triton.jit
def _turn_halves(first, second, distance, high, low):
    """Both turned back by a distance, in their dtype."""
    cosine, sine = _angle(distance, high, low)
    u, w = first.to(tl.float32), second.to(tl.float32)
    return (u * cosine + w * sine).to(first.dtype), (w * cosine - u * sine).to(first.dtype)
