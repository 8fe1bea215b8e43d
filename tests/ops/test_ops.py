"""The pure functions: scans against loops, window attention against a dense mask, both in values, gradients, memory."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ahn_layers.ops.attention.sharing import share_columns
from ahn_layers.ops.attention.window_attention import masked_attention, window_attention
from ahn_layers.ops.decode.fold import delta_step
from ahn_layers.ops.pointwise.rotary import turn_back
from ahn_layers.ops.recurrence.delta_scan import gated_delta_scan
from ahn_layers.ops.recurrence.linear_scan import gated_linear_scan


def scan_inputs(length, states=2, heads=4, d=5, e=3):
    k = F.normalize(torch.randn(2, states, length, d, dtype=torch.float64), dim=-1)
    q, v = torch.randn(2, heads, length, d, dtype=torch.float64), torch.randn(2, states, length, e, dtype=torch.float64)
    g = -5 * torch.rand(2, states, length, dtype=torch.float64) ** 4
    beta = torch.rand(2, states, length, dtype=torch.float64)
    state = torch.randn(2, states, d, e, dtype=torch.float64)
    return [u.requires_grad_() for u in (state, q, k, v, beta, g)]


def loop(state, q, k, v, beta, g):
    """Token by token; without ``beta`` the plain sum, without ``g`` no decay."""
    repeats, reads = q.shape[1] // k.shape[1], []
    for t in range(q.shape[2]):
        state = state if g is None else state * g[:, :, t].exp()[..., None, None]
        if beta is None:
            state = state + torch.einsum("bsd,bse->bsde", k[:, :, t], v[:, :, t])
        else:
            state = delta_step(state, k[:, :, t], v[:, :, t], beta[:, :, t])
        reads.append(torch.einsum("bhde,bhd->bhe", state.repeat_interleave(repeats, 1), q[:, :, t]))
    return torch.stack(reads, dim=2), state


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_chunked_scan_equals_the_loop(rule, gated, length):
    state, q, k, v, beta, g = scan_inputs(length)
    g = g if gated else None
    if rule == "linear":
        fast, slow = gated_linear_scan(state, q, k, v, g, chunk_size=32), loop(state, q, k, v, None, g)
    else:
        fast, slow = gated_delta_scan(state, q, k, v, beta, g), loop(state, q, k, v, beta, g)
    inputs = [u for u in (state, q, k, v, beta, g) if u is not None]
    weights = [torch.randn_like(u) for u in slow]
    gradients = [
        torch.autograd.grad(sum((u * w).sum() for u, w in zip(r, weights, strict=True)), inputs, materialize_grads=True)
        for r in (fast, slow)
    ]
    for one, other in zip((*fast, *gradients[0]), (*slow, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_strong_decay_does_not_overflow():
    """Log decays of a whole chunk sum to -3200: only differences between tokens may be exponentiated."""
    state, q, k, v, beta, _ = (u.detach().float() for u in scan_inputs(64))
    g = torch.full_like(beta, -100.0)
    for r, end in (gated_linear_scan(state, q, k, v, g), gated_delta_scan(state, q, k, v, beta, g)):
        assert torch.isfinite(r).all() and torch.isfinite(end).all()


@pytest.mark.parametrize("used", [(1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 1)])
@pytest.mark.parametrize("bounds", [((0, 9), (2, 5)), ((4, 9), (0, 3))])
def test_shared_columns_have_the_gradients_of_slices(bounds, used):
    u, v = (torch.randn(2, 3, 9, 4).requires_grad_() for _ in range(2))
    (a, b), (c, d) = bounds
    found, slices = [], [u, u[:, :, a:b], v, v[:, :, c:d]]
    shared = [w for pair in share_columns((u, a, b), (v, c, d)) for w in pair]
    for tensors in (slices, shared):
        loss = sum((w * (i + w)).sum() for i, w in enumerate(tensors, 1) if used[i - 1])
        found.append(torch.autograd.grad(loss, (u, v)))
    for mine, other in zip([*shared, *found[1]], [*slices, *found[0]], strict=True):
        torch.testing.assert_close(mine, other)
    u, v = (w.detach().double().requires_grad_() for w in (u, v))
    assert torch.autograd.gradgradcheck(lambda u, v: sum(share_columns((u, a, b), (v, c, d)), ()), (u, v))


def attention_inputs(length, past, sinks, dtype=torch.float64):
    shapes = ((4, length), (2, sinks), (2, sinks), (2, past + length), (2, past + length))
    sizes = (8, 8, 6, 8, 6)
    return [torch.randn(2, *s, d, dtype=dtype).requires_grad_() for s, d in zip(shapes, sizes, strict=True)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("length, past, window", [(300, 0, 16), (300, 15, 16), (140, 40, 200), (5, 3, 4), (300, 1, 1)])
def test_window_attention_equals_a_dense_mask(length, past, window, softcap):
    sinks = 3
    q, sink_k, sink_v, context_k, context_v = attention_inputs(length, past, sinks)
    rank = torch.arange(length) + past + sinks
    out = window_attention(
        q, sink_k, sink_v, context_k, context_v, rank, window_size=window, num_sinks=sinks, softcap=softcap
    )
    t, j = rank[:, None], torch.arange(past + length) + sinks
    visible = torch.cat((torch.ones(length, sinks, dtype=torch.bool), (j <= t) & (j > t - window)), dim=1)
    k, v = (torch.cat(pair, dim=2).repeat_interleave(2, 1) for pair in ((sink_k, context_k), (sink_v, context_v)))
    logits = q @ k.mT * 8**-0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    dense = logits.masked_fill(~visible, float("-inf")).softmax(-1) @ v
    tolerance = {"rtol": 0, "atol": 1e-6} if softcap else {"rtol": 0, "atol": 1e-12}  # logits are capped in float32
    torch.testing.assert_close(out, dense, **tolerance)
    inputs, weight = (q, sink_k, sink_v, context_k, context_v), torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad((u * weight).sum(), inputs) for u in (out, dense)), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("softcap", [None, 1e6])
@pytest.mark.parametrize("length", [1, 20])
def test_other_queries_for_the_sinks(length, softcap):
    """Equal to a single attention in which the sinks' logits come from the other queries."""
    q, sink_k, sink_v, k, v = (u.detach() for u in attention_inputs(length, 0, 3, torch.float32))
    other = torch.randn_like(q)
    keys, values = torch.cat((sink_k, k), dim=2), torch.cat((sink_v, v), dim=2)
    out = masked_attention(q, keys, values, None, q_sinks=other, num_sinks=3, softcap=softcap)
    keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    logits = torch.cat((other @ keys[:, :, :3].mT, q @ keys[:, :, 3:].mT), dim=-1)
    torch.testing.assert_close(out, (logits * 8**-0.5).softmax(-1) @ values)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start, size", [(0, 8), (0, 12), (4, 12)])
def test_turning_back_undoes_the_rotation(interleaved, start, size):
    inv_freq = 0.1 ** torch.arange(4, dtype=torch.float64)
    q, position = torch.randn(2, 3, 5, size, dtype=torch.float64), torch.arange(100, 105)
    pairs = [(start + 2 * i, start + 2 * i + 1) if interleaved else (start + i, start + i + 4) for i in range(4)]
    rotated = q.clone()
    for (a, b), f in zip(pairs, inv_freq, strict=True):
        cos, sin = torch.cos(position * f), torch.sin(position * f)
        rotated[..., a], rotated[..., b] = q[..., a] * cos - q[..., b] * sin, q[..., b] * cos + q[..., a] * sin
    back = turn_back(rotated, position, inv_freq, interleaved=interleaved, start=start)
    torch.testing.assert_close(back, q, rtol=0, atol=1e-6)
    here = turn_back(rotated.float(), torch.zeros(5, dtype=torch.long), inv_freq, interleaved=interleaved, start=start)
    assert torch.equal(here, rotated.float())


PEAK = """
import sys, torch
from ahn_layers.ops.attention.window_attention import window_attention
torch.set_num_threads(1)
backward = sys.argv[1] == "True"
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
for length in (4096, 16384):
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=backward) for _ in range(3))
    out = window_attention(
        q, k[:, :, :4], v[:, :, :4], k, v, torch.arange(length), window_size=512, num_sinks=4
    )
    if backward:
        out.sum().backward()
    print(peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("backward", [False, True])
def test_window_attention_needs_memory_linear_in_the_length(backward):
    """From 4k to 16k tokens; one dense mask of 16k would hold 256 megabytes."""
    run = subprocess.run([sys.executable, "-c", PEAK, str(backward)], capture_output=True, text=True, check=True)
    short, long = map(int, run.stdout.split())
    growth = long - short
    assert growth < 50_000, growth  # kilobytes; a dense mask alone would grow by 240,000
