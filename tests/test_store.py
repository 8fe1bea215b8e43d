"""The contracts of the memory store, over every compressor, against the token-by-token oracle."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from ahn_layers import GatedDeltaNet, MemoryStore, RetNet, Window
from ahn_layers.ops.attention.attend import SoftmaxAttention

from . import oracle
from .methods import COMPRESSORS, KINDS, OPTIONS, RELEASED
from .stores import WINDOWS, B, D, E, G, H, N, T, close, make, per_state, run, tensors_of


@pytest.mark.parametrize(
    "compressor, sinks, window",
    [(compressor, *w) for compressor in COMPRESSORS for w in (WINDOWS if compressor in RELEASED else WINDOWS[3:4])],
)
def test_any_cutting_equals_the_oracle(compressor, sinks, window):
    store, tokens = make(compressor, sinks, window)
    expected, state = oracle.memory_store(store.compressor, sinks, window, *tokens)
    full = sinks + window
    for cuts in (
        [],
        range(1, T),
        [full],
        [full - 1] if full > 1 else [1],
        [full + 1],
        [1, 2, 12, 13, 14],
        [20, 21, 22],
        [13, 16, 21, 30],  # several at once into a full window, and others after them
    ):
        for inplace in (False, True):
            out, end = run(store, tokens, list(cuts), inplace=inplace)
            close(out, expected)
            close(end.memory, state)
            assert end.seen.tolist() == [T] * B and end.length == T


PADDINGS = {
    "left": [[0, T], [7, T]],
    "right": [[0, 3], [0, T - 1]],
    "all but one": [[5, 6], [0, T]],
    "nothing": [[0, 0], [0, T]],
}


@pytest.mark.parametrize("cuts", [[], [12], [5, 6, 20], range(1, T)], ids=["whole", "brim", "pieces", "tokens"])
@pytest.mark.parametrize("sinks, window", [(0, 3), (4, 8)])
def test_null_logits_take_their_part_of_every_softmax(sinks, window, cuts):
    """Learned sink logits, inside the window and beyond, with padding too; gradients reach them."""
    store, tokens = make(sinks=sinks, window=window)
    null = (2 * torch.randn(H, dtype=torch.float64)).requires_grad_()
    for valid in (None, (torch.arange(T) >= 3).expand(B, T)):
        expected, state = oracle.memory_store(store.compressor, sinks, window, *tokens, valid, null.detach())
        for inplace in (False, True):
            attention = SoftmaxAttention(null_logits=null)
            out, end = run(store, tokens, list(cuts), valid, inplace=inplace, attention=attention)
            close(out.detach(), expected)
            close(end.memory, state)
            assert inplace or bool((torch.autograd.grad(out.sum(), null)[0] != 0).all())


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("sinks, window", [(0, 3), (4, 8), (2, 40)])
def test_tokens_of_an_image_see_each_other(sinks, window, pads):
    """Within the image ahead too, whatever has left the window meanwhile; a call may end where an image does."""
    store, tokens = make(sinks=sinks, window=window)
    ahead = torch.arange(T).repeat(B, 1)
    ahead[0, 5 + pads : 14 + pads], ahead[1, 12:16], ahead[1, 16:25] = 13 + pads, 15, 24
    valid = None if not pads else torch.stack((torch.arange(T) >= pads, torch.ones(T, dtype=torch.bool)))
    expected, state = oracle.memory_store(store.compressor, sinks, window, *tokens, valid, None, ahead)
    for cuts in ([], [25], [4, 25, 26]):
        outs, end = [], None
        for a, b in pairwise((0, *cuts, T)):
            q, k, v, x = (u[..., a:b, :] for u in tokens)
            attention = SoftmaxAttention(ahead=ahead[:, a:b] - a)
            out, end = store(q, k, v, x, end, valid=None if valid is None else valid[:, a:b], attention=attention)
            outs.append(out)
        close(torch.cat(outs, dim=2), expected)
        close(end.memory, state)


@pytest.mark.parametrize(
    "compressor, padding",
    [
        (compressor, padding)
        for compressor in COMPRESSORS
        for padding in ([*PADDINGS, "middle"] if compressor in RELEASED else ["middle"])
    ],
)
def test_padding_is_nothing(compressor, padding):
    store, tokens = make(compressor, sinks=2, window=5)
    if padding == "middle":
        valid = torch.rand(B, T) < 0.6
    else:
        rank = torch.arange(T)
        valid = torch.stack([(rank >= a) & (rank < b) for a, b in PADDINGS[padding]])
    expected, state = oracle.memory_store(store.compressor, 2, 5, *tokens, valid)
    for cuts in ([], range(1, T), [4, 9, 10, 11], [16]):
        out, end = run(store, tokens, list(cuts), valid)
        close(out, expected)
        close(end.memory, state)
        assert end.seen.tolist() == valid.sum(1).tolist()


@pytest.mark.parametrize("anything", [1e30, float("inf"), float("nan")])
def test_padding_may_hold_anything(anything):
    store, tokens = make(sinks=2, window=5)
    valid = torch.rand(B, T) < 0.6
    expected, state = run(store, tokens, [9], valid)
    for u, mask in zip(tokens, (valid[:, None, :, None],) * 3 + (valid[..., None],), strict=True):
        u.masked_fill_(~mask, anything)
    out, end = run(store, tokens, [9], valid)
    close(out.transpose(1, 2)[valid], expected.transpose(1, 2)[valid])
    close(end.memory, state.memory)


@pytest.mark.parametrize("shared_state", [False, True])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_no_op_at_initialisation(compressor, shared_state):
    store, tokens = make(None)
    memory = compressor(N, H, D, num_kv_heads=G, value_dim=E, shared_state=shared_state).double()
    expected, _ = run(store, tokens, [])
    out, state = run(MemoryStore(store.window, memory), tokens, [])
    assert torch.equal(out, expected)
    for u in tensors_of(state.memory):
        assert u.shape[:2] == (B, memory.num_states) and u.abs().max() > 0
    one = tensors_of(memory.init_state(1, torch.zeros(())))[0]
    assert one.shape[1] == (G if shared_state or compressor in OPTIONS else H)


@pytest.mark.parametrize("compressor", [u for u in COMPRESSORS if u is not RetNet])  # whose states differ by number
def test_shared_state_equals_one_per_head_with_equal_gates(compressor):
    """With the gates of a group equal, a state per query head holds the same in every head of the group."""
    shared, tokens = make(compressor, sinks=1, window=4, shared_state=True)
    store, _ = make(compressor, sinks=1, window=4)
    weights = {}
    for name, u in shared.compressor.state_dict().items():
        weights[name] = per_state(name, u)
    store.compressor.load_state_dict(weights)
    out, state = run(store, tokens, [11])
    ours, end = run(shared, tokens, [11])
    close(ours, out)
    for one, other in zip(tensors_of(end.memory), tensors_of(state.memory), strict=True):
        close(one.repeat_interleave(other.shape[1] // one.shape[1], dim=1), other)


def test_inside_the_capacity_it_is_plain_causal_attention():
    store, (q, k, v, x) = make(sinks=T - 8, window=8)
    out, state = store(q, k, v, x)
    close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert not state.memory.any()


def test_dense_is_called_until_something_leaves():
    store, tokens = make(sinks=2, window=5)
    lengths = []

    def dense(q, k, v, valid=None):
        lengths.append((q.shape[2], k.shape[2]))
        assert valid is None or valid.shape == (B, k.shape[2])
        return q.new_zeros(*q.shape[:3], E)

    run(store, tokens, [3, 4, 7, 8], attention=SoftmaxAttention(dense=dense))
    assert lengths == [(3, 3), (1, 4), (3, 7)]
    run(store, tokens, [3, 5], torch.ones(B, T, dtype=torch.bool), attention=SoftmaxAttention(dense=dense))
    assert lengths[3:] == [(3, 3)], "with a padding mask for the first tokens only"


@pytest.mark.parametrize("valid", [None, torch.arange(T).expand(B, T) > 2])
@pytest.mark.parametrize("compressor", [None, GatedDeltaNet])
def test_in_training_slots_are_made_when_asked_for(compressor, valid, unchecked, monkeypatch):
    store, tokens = make(compressor, 2, 5)
    tokens[1].requires_grad_()
    with torch.no_grad():
        expected, end = run(store, tokens, [], valid)
    with monkeypatch.context() as patch:
        if valid is None:  # the sinks of padded rows are taken from the slots
            patch.setattr(Window, "slots_with", None)
        out, state = store(*tokens, valid=valid)
        assert torch.equal(out, expected)
    for after in (copy.copy(state), state):
        for name, u in after.tensors().items():
            assert torch.equal(u, end.tensors()[name])


def test_exactly_once():
    """An evicted token reaches the output through the state alone; a later token never does."""
    store, (q, k, v, x) = make(sinks=2, window=5)
    v.requires_grad_()
    for use_memory in (False, True):
        out, _ = (store if use_memory else store.without_memory())(q, k, v, x)
        for t in (0, 6, 7, 20):
            (gradient,) = torch.autograd.grad(out[:, :, t].sum(), v, retain_graph=True)
            reached = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
            seen = [j for j in range(t + 1) if use_memory or j < 2 or j > t - 5]
            assert reached == seen


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_gradients_do_not_depend_on_the_cutting(compressor):
    store, tokens = make(compressor, sinks=2, window=5)
    results = []
    for cuts in ([], [4, 9, 10, 11, 20]):
        inputs = [u.clone().requires_grad_() for u in tokens]
        out, state = run(store, inputs, cuts)
        total = out.square().sum() + sum(u.square().sum() for u in tensors_of(state.memory))
        results.append(torch.autograd.grad(total, [*inputs, *store.parameters()], materialize_grads=True))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradients_are_right():
    store, tokens = make(sinks=1, window=3)
    tokens = [u[:1, :, :7] if u.ndim == 4 else u[:1, :7] for u in tokens]
    torch.autograd.gradcheck(lambda *u: store(*u)[0], [u.requires_grad_() for u in tokens], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_a_float32_state(dtype):
    store, tokens = make()
    exact, state = run(store, tokens, [])
    low, end = run(store.to(dtype), [u.to(dtype) for u in tokens], [])
    assert low.dtype == dtype and end.slots.k.dtype == dtype and end.slots.gates["g"].dtype == dtype
    assert end.memory.dtype == torch.float32
    assert (low.double() - exact).abs().max() < 0.1 * exact.abs().max()
    assert (end.memory.double() - state.memory).abs().max() < 0.05 * state.memory.abs().max()


@pytest.mark.parametrize("sink_positions, limit", [("streaming", 6), ("trained", 11), ("absolute", 10**9)])
def test_sinks_stay_within_reach(sink_positions, limit):
    """Queries attend to sinks as if they stood at most ``limit`` tokens on, to the window as they are."""
    from ahn_layers import Rotary

    sinks, window = 2, 5
    inv_freq = 1.0 / 10 ** torch.arange(0, 1, 2 / D, dtype=torch.float64)
    rotate = lambda u, p: Rotary(inv_freq, 1).turn_back(u, -p)
    q, k, v = (torch.randn(1, 2, T, D) for _ in range(3))
    position = torch.arange(T)
    expected = torch.zeros(1, 2, T, D)
    for t in range(T):
        near = rotate(q[:, :, [t]], position[[t]].clamp(max=limit)) @ rotate(k, position).mT
        true = rotate(q[:, :, [t]], position[[t]]) @ rotate(k, position).mT
        logits = torch.where(position < sinks, near, true) / D**0.5
        seen = (position <= t) & ((position < sinks) | (position > t - window))
        expected[:, :, [t]] = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    store = MemoryStore(Window(window, num_sinks=sinks, sink_positions=sink_positions), None, Rotary(inv_freq, 12))
    tokens = [rotate(q, position), rotate(k, position), v, torch.zeros(1, T, 1)]
    valid = torch.ones(1, T, dtype=torch.bool)
    for cuts in ([], range(1, T), [3, 13, 14]):
        for mask in (None, valid):
            out, _ = run(store, tokens, list(cuts), mask)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("valid", [None, "padded"])
@pytest.mark.parametrize("compressor", KINDS)
def test_a_memory_may_know_no_positions(compressor, valid):
    """What the memory adds is what it adds to a store whose queries and keys were never rotated."""
    from ahn_layers import Rotary

    rotary = Rotary(1.0 / 10 ** torch.arange(0, 1, 2 / D, dtype=torch.float64), 12)
    plain, (q, k, v, x) = make(compressor)
    valid = None if valid is None else torch.rand(B, T) < 0.7
    rank = torch.arange(T).expand(B, T) if valid is None else valid.long().cumsum(1) - 1
    rotated = [rotary.turn_back(q, -rank), rotary.turn_back(k, -rank), v, x]
    store = MemoryStore(plain.window, plain.compressor, rotary, memory_positions="none")

    def added(store, tokens, cuts=(), **options):
        whole = run(store, tokens, list(cuts), valid, **options)
        return whole[0] - run(store.without_memory(), tokens, [], valid)[0], whole[1].memory

    expected, state = added(plain, (q, k, v, x))
    assert expected.norm() > 1
    for cuts in ([], range(1, T), [3, 13, 14, 27]):
        for inplace in (False, True):
            found, end = added(store, rotated, cuts, inplace=inplace)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # angles are as precise as the queries
            torch.testing.assert_close(end, state, rtol=0, atol=2e-6)
    assert (added(MemoryStore(plain.window, plain.compressor, rotary), rotated)[0] - expected).norm() > 0.1
