"""Chunked scans against their recurrences token by token, in float64: values, gradients, and decays of any strength."""

import pytest
import torch
from torch.nn import functional as F

from ahn_layers.ops.recurrence.channel_chunks import Decays
from ahn_layers.ops.recurrence.channel_scan import channel_scan, rank_one_scan, rank_one_step
from ahn_layers.ops.recurrence.momentum_scan import momentum_scan, momentum_step
from ahn_layers.ops.slots.pooling import pool_read, pool_scan, pool_step

STATES, HEADS, D, E = 2, 4, 5, 3
STRENGTHS = {"weak": 0.01, "usual": 1.0, "strong": 300.0, "mixed": None}
KINDS = ["gla", "kda", "rank one"]


def random(*shape):
    return torch.randn(2, *shape, dtype=torch.float64)


def decays(strength, *shape):
    """Log decays; of mixed ones a third empties a channel at once, and the others hardly decay."""
    g = -(torch.rand(2, *shape, dtype=torch.float64) ** 2)
    return g * (torch.where(torch.rand_like(g) < 0.3, 300.0, 1e-3) if strength is None else strength)


def inputs(length, strength):
    return {
        "state": random(STATES, D, E),
        "q": random(HEADS, length, D),
        "k": F.normalize(random(STATES, length, D), dim=-1),
        "v": random(STATES, length, E),
        "g": decays(strength, STATES, length, D),
        "beta": torch.rand(2, STATES, length, dtype=torch.float64),
        "a": F.normalize(random(STATES, length, D), dim=-1),
        "b": -0.5 * random(STATES, length, D),
    }


def read(state, q):
    return torch.einsum("bhde,bhd->bhe", state.repeat_interleave(HEADS // STATES, 1), q)


def token_by_token(kind, state, q, k, v, g, beta, a, b):
    reads = []
    for t in range(q.shape[2]):
        key, value = k[:, :, t], v[:, :, t]
        if kind == "rank one":
            state = rank_one_step(state, key, value, g[:, :, t], a[:, :, t], b[:, :, t])
        else:
            state = state * g[:, :, t].exp()[..., None]
            if kind == "kda":
                value = beta[:, :, t, None] * (value - torch.einsum("bsde,bsd->bse", state, key))
            state = state + key[..., None] * value[:, :, None]
        reads.append(read(state, q[:, :, t]))
    return torch.stack(reads, dim=2), state


def in_chunks(kind, state, q, k, v, g, beta, a, b, size=None):
    if kind == "rank one":
        return rank_one_scan(state, q, k, v, g, a, b, chunk_size=size)
    return channel_scan(state, q, k, v, g, beta if kind == "kda" else None, chunk_size=size)


def with_gradients(run, given):
    given = [u.detach().requires_grad_() for u in given]
    outs = run(*given)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u.dtype) for u in outs]
    return [*outs, *torch.autograd.grad(outs, given, weights, materialize_grads=True)]


@pytest.mark.parametrize("length, size", [(1, None), (31, 32), (33, 32), (70, 16), (70, None)])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_decays_by_channel(kind, strength, length, size):
    given = list(inputs(length, STRENGTHS[strength]).values())
    if kind == "rank one" and strength == "weak":
        given[-1] = -0.9 * given[-2]  # nothing but the erasure keeps it from growing
    slow = with_gradients(lambda *u: token_by_token(kind, *u), given)
    fast = with_gradients(lambda *u: in_chunks(kind, *u, size=size), given)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_exact_for_strong_decays(kind):
    """What hardly decays is exact beside channels that are emptied again and again: nothing is subtracted."""
    given = list(inputs(64, None).values())
    given[-1] = 0.1 * given[-1]
    slow = with_gradients(lambda *u: token_by_token(kind, *u), given)
    fast = with_gradients(lambda *u: in_chunks(kind, *u), [u.float() for u in given])
    for one, other in zip(fast, slow, strict=True):
        assert (one.double() - other).norm() <= 2e-6 * other.norm()


def test_decays_within_a_chunk():
    g = decays(None, 32, D)
    found = Decays.of(g)
    torch.testing.assert_close(found.since, g.cumsum(dim=1))
    torch.testing.assert_close(found.before, g.cumsum(dim=1) - g, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.until, g.flip(1).cumsum(dim=1).flip(1) - g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("folds", [None, "some", "none"])
@pytest.mark.parametrize("length", [1, 32, 70])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_momentum(strength, length, folds):
    strength, mask = STRENGTHS[strength], None
    if folds is not None:
        mask = (torch.rand(2, STATES, length) < 0.7) & (folds == "some")
    given = [random(STATES, D, E), 0.1 * random(STATES, D, E), random(HEADS, length, D)]
    given += [F.normalize(random(STATES, length, D), dim=-1), random(STATES, length, E)]
    given += [torch.rand(2, STATES, length, dtype=torch.float64), *(decays(strength, STATES, length) for _ in range(2))]

    def loop(state, momentum, q, k, v, beta, m, g):
        reads = []
        for t in range(length):
            both = momentum_step(state, momentum, *(u[:, :, t] for u in (k, v, beta, m, g)))
            if mask is not None:
                where = mask[:, :, t, None, None]
                both = torch.where(where, both[0], state), torch.where(where, both[1], momentum)
            state, momentum = both
            reads.append(read(state, q[:, :, t]))
        return torch.stack(reads, dim=2), state, momentum

    slow, fast = with_gradients(loop, given), with_gradients(lambda *u: momentum_scan(*u, mask), given)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.8, 0.97])
def test_momentum_in_the_range_of_titans_never_grows(eta):
    """Keys that turn from token to token are the worst: larger steps resonate with them."""

    def growth(step):
        found = []
        for turn in (0.01, 0.1, 0.2, 0.27, 0.3, 0.5, 1.0, 2.8, 3.1):
            angle = turn * torch.arange(600, dtype=torch.float64)
            k, one = torch.stack((angle.cos(), angle.sin()), dim=-1)[None, None], torch.ones(1, 1, 600).double()
            start = torch.eye(2, dtype=torch.float64)[None, None]
            gates = (step * one, one * torch.tensor(eta, dtype=torch.float64).log(), 0 * one)
            _, state, momentum = momentum_scan(start, 0 * start, k, k, torch.zeros_like(k), *gates)
            c = eta / (1 - eta)
            size = (state + c * momentum).square().sum() + (c * momentum).square().sum() / eta
            found.append(float(size / start.square().sum()))
        return max(found)

    largest = (1 - eta) ** 2 / (1 + eta)
    assert growth(largest) <= 1 and growth(2 * largest) <= 1 + 1e-9
    assert eta < 0.7 or growth(1 - eta) > 100


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("rate, slots", [(1, 1), (3, 2), (4, 50), (40, 3)])
def test_pooling(pool, rate, slots):
    """Over several calls, in which heads take in other tokens."""
    sizes = {"keys": (slots, D), "values": (slots, E), "filled": (), "open_keys": (D,), "open_values": (E,)}
    state = {name: torch.zeros(2, STATES, *u, dtype=torch.float64) for name, u in (sizes | {"opened": ()}).items()}
    slow = state
    for length in (2, 30, 5):
        q, k, v = random(HEADS, length, D), random(STATES, length, D), random(STATES, length, E)
        folds, reads = torch.rand(2, STATES, length) < 0.8, []
        fast, state = pool_scan(state, q, k, v, folds, rate=rate, pool=pool, scale=0.7)
        for t in range(length):
            after = pool_step(slow, k[:, :, t], v[:, :, t], rate, pool)
            where = folds[:, :, t]
            slow = {n: torch.where(where.view(2, -1, *[1] * (u.ndim - 2)), after[n], u) for n, u in slow.items()}
            reads.append(pool_read(slow, q[:, :, t], 0.7, pool))
        torch.testing.assert_close(fast, torch.stack(reads, dim=2))
        torch.testing.assert_close(state, slow)
