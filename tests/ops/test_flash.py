"""Window attention in PyTorch's fused kernels. These run on a GPU: here plain operations stand in for them."""

import pytest
import torch

from ahn_layers import GatedDeltaNet, MemoryStore, Rotary, Window
from ahn_layers.ops.attention import flash_attention, forms
from ahn_layers.ops.attention import pieces as cut
from ahn_layers.ops.attention.join import join
from ahn_layers.ops.attention.window_attention import window_attention


def logits_of(q, k, back, scale):
    """``(b, h, t, s)``, aligned at the end."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if back is None:
        return logits
    at = torch.arange(q.shape[1]).unsqueeze(1) + k.shape[1] - q.shape[1]
    column = torch.arange(k.shape[1])
    return logits.masked_fill((column > at) | (column <= at - back), float("-inf"))


def values_of(probabilities, v):
    return torch.einsum("bhts,bshd->bthd", probabilities, v.repeat_interleave(probabilities.shape[1] // v.shape[2], 2))


def forward(part, scale):
    q, k, v, back = part
    assert k.shape[1] >= (0 if back is None else q.shape[1])
    logits = logits_of(q, k, back, scale)
    return values_of(logits.softmax(-1), v), logits.logsumexp(-1), (None, None)


def backward(grad, part, out, lse, extra, scale):
    """As FlashAttention's: probabilities from the log-sum-exp that is given, their gradients from the output given."""
    q, k, v, back = part
    leaves = [u.detach().requires_grad_() for u in (q, k, v)]
    with torch.enable_grad():
        logits = logits_of(*leaves[:2], back, scale)
        p = (logits - lse.unsqueeze(-1)).exp()
        row = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        dp = torch.einsum("bthd,bshd->bhts", grad, v.repeat_interleave(q.shape[2] // v.shape[2], 2))
        ds = (p * (dp - row)).detach()
        objective = (logits.masked_fill(ds == 0, 0) * ds).sum() + (values_of(p.detach(), leaves[2]) * grad).sum()
    return torch.autograd.grad(objective, leaves)


@pytest.fixture
def kernels(monkeypatch):
    """The fused path, with plain operations in the place of the kernels."""
    calls = []
    monkeypatch.setattr(forms, "is_fused", lambda q, v: q.shape[-1] == v.shape[-1])
    monkeypatch.setattr(flash_attention, "_flash", lambda part, scale: calls.append(part) or forward(part, scale))
    monkeypatch.setattr(flash_attention, "_flash_backward", backward)
    return calls


def inputs(length, past, sinks, device="cpu", dtype=torch.float64, size=8):
    shapes = ((4, length), (2, sinks), (2, sinks), (2, past + length), (2, past + length))
    return [torch.randn(2, *s, size, dtype=dtype, device=device).requires_grad_() for s in shapes]


CASES = [(40, 0, 16, 0), (40, 9, 16, 3), (40, 3, 16, 5), (5, 15, 16, 50), (3, 7, 4, 60), (2, 0, 4, 0), (30, 0, 1, 2)]


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("far", [0, 2])
@pytest.mark.parametrize("length, past, window, first", CASES)
def test_fused_path_equals_the_plain_one(kernels, length, past, window, first, far, sinks):
    tensors = inputs(length, past, sinks)
    first = max(first, past)
    rank = first + torch.arange(length)
    far = min(far, max(0, first + length - sinks)) if sinks else 0
    turned = torch.randn(2, 4, far, 8, dtype=torch.float64).requires_grad_() if far else None
    leaves = tensors + ([turned] if far else [])
    weight, found = torch.randn(2, 4, length, 8, dtype=torch.float64), []
    for known in (first, None):
        out = window_attention(
            *tensors, rank, window_size=window, num_sinks=sinks, q_sinks=turned, first_rank=known, scale=0.7
        )
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)])
    assert kernels or first + length <= sinks
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cuts", [None, 7, 20])
def test_a_store_takes_the_fused_path(kernels, cuts):
    rotary = Rotary(10_000.0 ** (-torch.arange(0, 8, 2) / 8), trained_length=30)
    store = MemoryStore(Window(16, num_sinks=3), GatedDeltaNet(24, 4, 8, num_kv_heads=2), rotary).double()
    torch.nn.init.normal_(store.compressor.o_proj.weight)
    q, (k, v), x = (
        torch.randn(1, 4, 60, 8).double(),
        torch.randn(2, 1, 2, 60, 8).double(),
        torch.randn(1, 60, 24).double(),
    )
    state, outs = None, []
    for part in torch.arange(60).split(cuts or 60):
        out, state = store(q[:, :, part], k[:, :, part], v[:, :, part], x[:, part], state)
        outs.append(out)
    assert kernels
    valid = torch.ones(1, 60, dtype=torch.bool)  # rows that may differ take the plain path
    expected, end = store(q, k, v, x, valid=valid)
    torch.testing.assert_close(torch.cat(outs, dim=2), expected)
    torch.testing.assert_close(state.memory, end.memory)


@pytest.fixture
def pieces(monkeypatch):
    """Pieces without masks, as on Hopper: how many keys each call sees, with plain operations in the kernels' place."""
    calls = []

    def cudnn(q, k, v, causal, scale):
        calls.append(k.shape[2])
        tensors = [u.transpose(1, 2) for u in (q, k, v)]
        if not causal:
            return forward((*tensors, None), scale)[:2]
        assert q.shape[2] == k.shape[2]  # of unequal lengths, the library and we might align differently
        return forward((*tensors, q.shape[2]), scale)[:2]

    monkeypatch.setattr(cut, "cudnn", cudnn)
    monkeypatch.setattr(forms, "has_cudnn", lambda q: True)
    return calls


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("past, window", [(1100, 1100), (1500, 1024), (1100, 1612), (600, 1300), (0, 512)])
def test_pieces_without_masks_are_the_window(kernels, pieces, past, window, sinks):
    """Of a full window, and of one that is not full before the last query."""
    tensors = [u.detach() for u in inputs(512, past, sinks)]
    first = past + sinks
    options = {"window_size": window, "num_sinks": sinks, "scale": 0.7}
    with torch.no_grad():
        out = window_attention(*tensors, first + torch.arange(512), first_rank=first, **options)
    expected = window_attention(*tensors, first + torch.arange(512), **options)
    torch.testing.assert_close(out, expected)
    seen = [window - 512 - 1, 512, 512] if past + 512 > window else [past, 512] if past else [512]
    assert pieces == seen + [sinks] * (sinks > 0) and not kernels


@pytest.mark.parametrize("sinks", [0, 3])
def test_the_first_tokens_are_one_piece(kernels, pieces, sinks):
    q, k, v = (u.detach() for i, u in enumerate(inputs(600, 0, 0)) if i in (0, 3, 4))
    options = {"window_size": 600 - sinks, "num_sinks": sinks, "scale": 0.7}
    with torch.no_grad():
        out = window_attention(q, None, None, k, v, torch.arange(600), first_rank=0, **options)
    torch.testing.assert_close(out, window_attention(q, None, None, k, v, torch.arange(600), **options))
    assert pieces == [600] and not kernels
    with torch.no_grad():  # a shorter window leaves tokens behind
        window_attention(q, None, None, k, v, torch.arange(600), first_rank=0, **options | {"window_size": 596})
    assert len(pieces) == 1 and kernels


def test_parts_join_to_one_softmax():
    q, k, v = torch.randn(3, 1, 20, 2, 8, dtype=torch.float64)
    whole, lse, _ = forward((q, k, v, None), 0.3)
    parts = [forward((q, k[:, a:b], v[:, a:b], None), 0.3)[:2] for a, b in ((0, 3), (3, 15), (15, 20))]
    out, total = join(*zip(*parts, strict=True))
    torch.testing.assert_close((out, total), (whole, lse))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("length, past, window, first", [*CASES, (700, 300, 256, 900)])
def test_kernels_on_the_gpu(length, past, window, first, size):
    first, sinks = max(first, past), 3
    tensors = inputs(length, past, sinks, size=size)
    rank, weight = first + torch.arange(length), torch.randn(2, 4, length, size, dtype=torch.float64)
    expected = window_attention(*tensors, rank, window_size=window, num_sinks=sinks)
    gradients = torch.autograd.grad((expected * weight).sum(), tensors, materialize_grads=True)
    half = [u.detach().to("cuda", torch.bfloat16).requires_grad_() for u in tensors]
    out = window_attention(*half, rank.cuda(), window_size=window, num_sinks=sinks, first_rank=first)
    found = torch.autograd.grad((out * weight.to("cuda")).sum(), half, materialize_grads=True)
    for one, other in zip((out, *found), (expected, *gradients), strict=True):
        error = (one.double().cpu() - other).norm() / other.norm().clamp(min=1e-9)
        assert error < 2e-2 or other.norm() < 1e-6
