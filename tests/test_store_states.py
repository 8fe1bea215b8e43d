"""The state of a store: of fixed size, never changed unless asked, and refused where it does not fit."""

import copy

import pytest
import torch

from ahn_layers import Compressor, DeltaNet, GatedDeltaNet, MemoryState, MemoryStore, Window
from ahn_layers.layers import outer

from .stores import B, D, E, G, T, close, make, run


def test_a_state_is_never_changed_unless_asked():
    store, tokens = make(sinks=2, window=5)
    _, state = run(store, tokens, [])
    before = state.clone()
    one, _ = run(store, tokens, [1, 2], state=state)
    other, _ = run(store, tokens, [1, 2], state=state)
    assert torch.equal(one, other)
    for name, u in state.tensors().items():
        assert torch.equal(u, before.tensors()[name]), name


def test_tensors_may_be_used_again_for_the_next_tokens():
    """Where gradients are recorded too, though nothing has one."""
    store, tokens = make(None, sinks=2, window=5)
    expected, _ = run(store, tokens, [])
    reused, outs, state = [u[..., :1, :].clone() for u in tokens], [], None
    for t in range(T):
        for u, given in zip(reused, tokens, strict=True):
            u.copy_(given[..., t : t + 1, :])
        out, state = store(*reused, state)
        outs.append(out)
    close(torch.cat(outs, dim=2), expected)


def test_size_is_fixed_once_the_window_is_full():
    store, tokens = make(sinks=2, window=5)
    sizes = [run(store, [u[:, :, :t] if u.ndim == 4 else u[:, :t] for u in tokens], [])[1].nbytes for t in (7, 8, T)]
    assert sizes[0] == sizes[1] == sizes[2]
    like = torch.zeros((), dtype=torch.float64)
    rowwise = store.bytes_per_row(like, num_kv_heads=G, head_dim=D, value_dim=E)
    assert sizes[0] == B * rowwise


def test_one_token_at_a_time_in_place_keeps_addresses():
    store, tokens = make(sinks=2, window=5)
    _, state = run(store, tokens, [])
    addresses = {name: u.data_ptr() for name, u in state.tensors().items() if name != "memory"}
    _, end = run(store, tokens, range(1, T), state=state, inplace=True)
    assert end is state
    assert addresses.items() <= {name: u.data_ptr() for name, u in end.tensors().items()}.items()


def test_in_place_steps_leave_earlier_states_alone():
    """A state kept from before the window was full shares nothing with the one that is overwritten later."""
    store, tokens = make(sinks=2, window=5)
    kept = []
    state = None
    for t in range(T):
        part = [u[..., t : t + 1, :] for u in tokens]
        if state is not None:
            state.inplace = True
        with torch.no_grad():
            _, state = store(*part, state)
        if t < 7:
            kept.append((state, state.clone()))
    for early, kept_copy in kept[:-1]:
        for name, u in early.tensors().items():
            assert torch.equal(u, kept_copy.tensors()[name]), name


def test_a_state_of_several_tensors():
    class Momentum(Compressor):
        """A running sum of a running mean."""

        def init_state(self, batch_size, like):
            return {"mean": super().init_state(batch_size, like), "total": super().init_state(batch_size, like)}

        def fold(self, state, k, v):
            mean = 0.9 * state["mean"] + outer(k, v)
            return {"mean": mean, "total": state["total"] + mean}

        def read(self, state, q):
            return super().read(state["total"], q)

    store, tokens = make(Momentum, sinks=2, window=5)
    valid = torch.rand(B, T) < 0.6
    whole, end = run(store, tokens, [], valid)
    steps, state = run(store, tokens, range(1, T), valid, inplace=True)
    close(steps, whole)
    for name, u in state.memory.items():
        close(u, end.memory[name])
    assert isinstance(end.clone().memory, dict) and "memory.total" in end.tensors()


BAD_CALLS = {
    "three dimensions": (lambda c: c.update(q=c["q"][0]), "q has shape"),
    "no tokens": (lambda c: c.update(q=c["q"][:, :, :0]), "no tokens"),
    "cached keys passed again": (lambda c: c.update(k=c["k"].repeat(1, 1, 2, 1)), "Pass the new tokens only"),
    "heads that do not divide": (
        lambda c: c.update(k=c["k"].repeat(1, 2, 1, 1)[:, :3], v=c["v"].repeat(1, 2, 1, 1)[:, :3]),
        "3 key/value heads",
    ),
    "two dtypes": (lambda c: c.update(v=c["v"].float()), "one dtype"),
    "head size": (lambda c: c.update(q=c["q"][..., :4], k=c["k"][..., :4]), "head_dim=8, the attention has 4"),
    "value size": (lambda c: c.update(v=c["v"][..., :4]), "value_dim=6, the attention has 4"),
    "no hidden states": (lambda c: c.update(x=None), "x=None"),
    "hidden size": (lambda c: c.update(x=c["x"][..., :4]), "hidden_size"),
    "mask shape": (lambda c: c.update(valid=torch.ones(B, T + 1, dtype=torch.bool)), "valid has shape"),
    "mask dtype": (lambda c: c.update(valid=torch.ones(B, T)), "boolean mask"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_what_is_wrong(case, unchecked):
    spoil, message = BAD_CALLS[case]
    store, tokens = make()
    call = dict(zip("qkvx", tokens, strict=True))
    spoil(call)
    with pytest.raises(ValueError, match=message):
        store(**call)


BAD_STATES = {
    "another batch": (lambda s: s.reorder(torch.tensor([0])), "1 rows"),
    "another dtype": (lambda s: s._map(lambda u: u.float() if u.is_floating_point() else u), "torch.float32"),
    "another window": (lambda s: MemoryState(Window(9, 4), s.slots, s.seen, s.memory), "same window"),
    "another layer": (
        lambda s: MemoryState(s.window, s.slots.map(lambda u: u[:, :1]), s.seen, s.memory),
        "another layer",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_unchanged(case, unchecked):
    spoil, message = BAD_STATES[case]
    store, tokens = make()
    state = spoil(run(store, tokens, [])[1])
    before = state.clone().tensors()
    state.inplace = True
    with pytest.raises(ValueError, match=message), torch.no_grad():
        store(*tokens, state)
    assert all(torch.equal(u, before[name]) for name, u in state.tensors().items())


def test_a_state_without_memory_is_refused():
    store, tokens = make()
    _, state = store.without_memory()(*tokens)
    with pytest.raises(ValueError, match="made without the long-term memory"):
        store(*tokens, state)
    _, state = store(*tokens)
    before = state.clone().tensors()
    with pytest.raises(ValueError, match="made with the long-term memory and is continued without it"):
        store.without_memory()(*tokens, state)
    assert all(torch.equal(u, before[name]) for name, u in state.tensors().items())


def test_without_memory_is_a_view_of_the_store():
    store, tokens = make(sinks=2, window=5)
    view = store.without_memory()
    assert view.without_memory() is view and not list(view.parameters())
    store.window = Window(7, num_sinks=1)
    torch.testing.assert_close(store.without_memory()(*tokens)[0], MemoryStore(Window(7, num_sinks=1))(*tokens)[0])
    copied = copy.deepcopy(store)
    copied.window = Window(3)
    assert store.without_memory().window.window_size == 7 and copied.without_memory().window.window_size == 3


def test_a_state_of_another_compressor_is_refused():
    store, tokens = make(GatedDeltaNet)
    _, state = store(*tokens)
    with pytest.raises(ValueError, match="another compressor"):
        make(DeltaNet)[0](*tokens, state)


def test_empty_slots_hold_zeros():
    """So that a padded row's state is the row's own, whatever stood at the padding."""
    store, tokens = make(sinks=2, window=9)
    valid = torch.zeros(B, T, dtype=torch.bool)
    valid[0, 3:6], valid[1, 4] = True, True
    for end in (8, 20, T):
        part = [u[..., :end, :] for u in tokens]
        _, state = run(store, part, [8] if end > 8 else [], valid[:, :end])
        for u in state.slots.tensors:
            assert not u[0, :, 3:].any() and not u[1, :, 1:].any()
            assert u[0, :, :3].abs().min() > 0
