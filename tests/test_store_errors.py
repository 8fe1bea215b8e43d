"""Calls and states that a store refuses: each error names a remedy, and nothing has changed."""

import pytest
import torch
from torch import nn

from ahn_layers import DeltaNet, GatedDeltaNet, MemoryState, MemoryStore, Window

from .refusing import refused

pytestmark = pytest.mark.usefixtures("unchecked")


def store_and_tokens(compressor=GatedDeltaNet, window=5, length=20):
    memory = None if compressor is None else compressor(16, 4, 8, num_kv_heads=2)
    for parameter in () if memory is None else memory.parameters():
        nn.init.normal_(parameter, std=0.5)
    sizes = {"q": (2, 4, length, 8), "k": (2, 2, length, 8), "v": (2, 2, length, 8), "x": (2, length, 16)}
    return MemoryStore(Window(window, num_sinks=2), memory), {name: torch.randn(size) for name, size in sizes.items()}


def part(call, start, stop):
    return {name: u[..., start:stop, :] for name, u in call.items()}


def as_dtype(state, dtype):
    return state._map(lambda u: u.to(dtype) if u.is_floating_point() else u)


def fewer_heads(state):
    return MemoryState(state.window, state.slots.map(lambda u: u[:, :1]), state.seen, state.memory)


def of_another(compressor=GatedDeltaNet, window=5):
    def make(_):
        store, call = store_and_tokens(compressor, window)
        return store(**call)[1]

    return make


def changed(name, function):
    return lambda call: call | {name: function(call[name])}


CALLS = {
    "no batch": (changed("k", lambda u: u[0]), "k has shape (2, 1, 8)", "expected floating (batch, heads, tokens"),
    "integers": (changed("v", lambda u: u.long()), "v has shape", "torch.int64", "expected floating"),
    "no tokens": (lambda c: part(c, 0, 0), "no tokens", "at least one"),
    "no rows": (lambda c: {name: u[:0] for name, u in c.items()}, "q has shape (0, 4, ", "an empty batch"),
    "no heads": (lambda c: c | {name: c[name][:, :0] for name in "kv"}, "k has shape (2, 0, ", "at least 1"),
    "no channels": (changed("v", lambda u: u[..., :0]), "v has shape (2, 2, ", "at least 1"),
    "the cached keys again": (changed("k", lambda u: u.repeat(1, 1, 2, 1)), "k (2, 2, 2, 8)", "the new tokens only"),
    "heads that do not divide": (
        lambda c: c | {name: c[name].repeat(1, 2, 1, 1)[:, :3] for name in "kv"}, "4 query heads and 3", "a multiple",
    ),
    "two dtypes": (changed("v", lambda u: u.double()), "v torch.float64 on cpu", "one dtype and one device"),
    "two devices": (changed("k", lambda u: u.to("meta")), "k torch.float32 on meta", "one dtype and one device"),
    "size of keys": (
        lambda c: c | {name: c[name][..., :4] for name in "qk"}, "GatedDeltaNet", "head_dim=8", "has 4", "make it with",
    ),
    "size of values": (changed("v", lambda u: u[..., :6]), "value_dim=8, the attention has 6", "value_dim=6"),
    "number of heads": (changed("q", lambda u: u[:, :2]), "num_heads=4, the attention has 2", "num_heads=2"),
    "no hidden states": (lambda c: c | {"x": None}, "x=None", "needs the hidden states"),
    "hidden states of all tokens": (
        changed("x", lambda u: u.repeat(1, 2, 1)), "x has shape (2, 2, 16)", "(2, 1, 16)", "x[:, -1:]",
    ),
    "mask of floats": (lambda c: c | {"valid": torch.ones(2, 1)}, "torch.float32", "boolean mask of shape (2, 1)"),
    "mask of all tokens": (
        lambda c: c | {"valid": torch.ones(2, 21) > 0}, "(2, 21)", "boolean mask of shape (2, 1)", "valid[:, -1:]",
    ),
    "mask of integers": (lambda c: c | {"valid": torch.ones(2, 1).long()}, "int64", "a boolean mask", "valid.bool()"),
    "hidden states of integers": (changed("x", lambda u: u.long()), "x has shape", "int64", "expected floating"),
    "hidden states of another layer": (changed("x", lambda u: u[..., :12]), "x has shape (2, 1, 12)", "(2, 1, 16)"),
    "hidden states, tokens first": (changed("x", lambda u: u.transpose(0, 1)), "(1, 2, 16)", "Pass x.transpose(0, 1)"),
    "hidden states elsewhere": (changed("x", lambda u: u.to("meta")), "x is on meta, q on cpu", "x.to(q.device)"),
    "another batch": (
        lambda c: {name: u[:1] for name, u in c.items()}, "state has 2 rows, the tokens have 1", "state.reorder(index)",
    ),
    "another dtype": (lambda c: {name: u.double() for name, u in c.items()}, "float32 on cpu, k is torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CALLS)
def test_calls_that_a_store_refuses(case, inplace):
    """The state of the failed call is bit for bit what it was, and goes on as if nothing had happened."""
    spoil, *parts = CALLS[case]
    store, call = store_and_tokens()
    with torch.no_grad():
        state = store(**part(call, 0, 18))[1]
        before, description = state.clone(), state.description()
        state.inplace = inplace
        with refused(ValueError, *parts):
            store(**spoil(part(call, 18, 19)), state=state)
        assert state.description() == description
        assert all(torch.equal(u, before.tensors()[name]) for name, u in state.tensors().items())
        out, end = store(**part(call, 18, 19), state=state)
        expected, other = store(**part(call, 18, 19), state=before)
        assert torch.equal(out, expected)
        assert all(torch.equal(u, other.tensors()[name]) for name, u in end.tensors().items())


ORDERS = {
    "tokens before heads": ((0, 2, 1, 3), "qkv", "q", "(batch, tokens, heads, size)"),
    "size before tokens": ((0, 1, 3, 2), "qkv", "q", "(batch, heads, size, tokens)"),
    "tokens first": ((2, 0, 1, 3), "qkv", "q", "(tokens, batch, heads, size)"),
    "heads first": ((1, 0, 2, 3), "qkv", "q", "(heads, batch, tokens, size)"),
    "the keys alone": ((0, 2, 1, 3), "k", "k", "(batch, tokens, heads, size)"),
    "the values alone": ((0, 2, 1, 3), "v", "v", "(batch, tokens, heads, size)"),
    "keys and values": ((0, 2, 1, 3), "kv", "k", "(batch, tokens, heads, size)"),
}


@pytest.mark.parametrize("compressor", [GatedDeltaNet, None])
@pytest.mark.parametrize("case", ORDERS)
def test_tensors_in_another_order_are_told_how_to_turn(case, compressor):
    order, names, blamed, looks = ORDERS[case]
    if compressor is None and names == "qkv" and order != (0, 2, 1, 3):
        pytest.skip("nothing is known of the sizes")
    store, call = store_and_tokens(compressor, length=21)
    expected = store(**call)[0]
    turned = call | {name: call[name].permute(order) for name in names}
    with refused(ValueError, f"{blamed} has shape {tuple(turned[blamed].shape)}", looks, f"Pass {blamed}.permute"):
        store(**turned)
    back = [order.index(i) for i in range(4)]
    assert torch.equal(store(**turned | {name: turned[name].permute(back) for name in names})[0], expected)


def test_keys_that_were_repeated_for_the_query_heads():
    """Right where every query head has its own state, and no reason to make another compressor where they share."""
    store, call = store_and_tokens(GatedDeltaNet, length=21)
    repeated = call | {name: call[name].repeat_interleave(2, dim=1) for name in "kv"}
    assert torch.allclose(store(**repeated)[0], store(**call)[0], atol=1e-5)
    state = store(**part(call, 0, 20))[1]
    with refused(ValueError, "the state holds k with 2 heads of 8, the tokens have 4", "repeated for the query heads"):
        store(**part(repeated, 20, 21), state=state)
    twice = call | {name: call[name].repeat_interleave(4, dim=1) for name in "kv"}
    with refused(ValueError, "4 query heads and 8 key/value heads", "not repeated for the query heads"):
        store(**twice)
    store = MemoryStore(store.window, GatedDeltaNet(16, 4, 8, num_kv_heads=2, shared_state=True))
    with refused(ValueError, "num_kv_heads=2, the attention has 4", "not repeated for the query heads"):
        store(**repeated)


def test_what_a_store_returned_is_not_the_state():
    store, call = store_and_tokens()
    with refused(TypeError, "state is a tuple", "the state that the last call returned"):
        store(**part(call, 18, 19), state=store(**part(call, 0, 18)))


STATES = {
    "window": (of_another(window=6), "Window(window_size=6", "Window(window_size=5", "the same window"),
    "compressor": (of_another(DeltaNet), "['beta']", "['beta', 'g']", "another compressor"),
    "no compressor": (of_another(None), "made without the long-term", "continued with", "state=None"),
    "batch": (lambda s: s.reorder(torch.tensor([0, 1, 1])), "3 rows, the tokens have 2", "state=None"),
    "dtype": (lambda s: as_dtype(s, torch.bfloat16), "torch.bfloat16 on cpu, k is torch.float32", "computed anew"),
    "device": (lambda s: s.to("meta"), "torch.float32 on meta, k is torch.float32 on cpu", "state.to(device)"),
    "layer": (fewer_heads, "k with 1 heads of 8, the tokens have 2 heads of 8", "another layer or model"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", STATES)
def test_states_that_a_store_refuses(case, inplace):
    make, *parts = STATES[case]
    store, call = store_and_tokens()
    with torch.no_grad():
        own = store(**part(call, 0, 18))[1]
        state, kept = make(own), own.clone()
        before = state.clone()
        state.inplace = inplace
        for stop in (19, 20):
            with refused(ValueError, *parts):
                store(**part(call, 18, stop), state=state)
        for one, other in ((state, before), (own, kept)):
            for name, u in one.tensors().items():
                assert u.is_meta or torch.equal(u, other.tensors()[name]), name
