"""A token in a full window, all rows alike: the short way equals the general one, and stays short."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ahn_layers import FoldAll, GatedDeltaNet, MemoryStore, SalientSlots, Window

from .methods import KINDS, OPTIONS

SIZES = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def inputs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, count, 8), (2, 2, count, 8), (2, 2, count, 8), (2, count, 24))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make(compressor=GatedDeltaNet, eviction=None):
    torch.manual_seed(0)
    eviction = FoldAll() if eviction is None else eviction.for_layer(**SIZES, value_dim=8)
    store = MemoryStore(Window(5, num_sinks=2), compressor(**SIZES, **OPTIONS.get(compressor, {})), eviction=eviction)
    for parameter in store.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return store


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("compressor", "eviction"), [*((c, None) for c in KINDS), (GatedDeltaNet, SalientSlots(3))], ids=str
)
@torch.no_grad()
def test_the_short_way_is_the_general_one(compressor, eviction, inplace):
    """The general one serves states whose length is known on the device alone."""
    store = make(compressor, eviction)
    _, state = store(*inputs(11, seed=1))
    short, general = state.clone(), replace(state.clone(), length=None)
    for seed in range(2, 12):
        short.inplace = inplace
        before, kept = short, short.clone()
        out, short = store(*inputs(1, seed), short)
        expected, general = store(*inputs(1, seed), general)
        assert torch.equal(out, expected)
        assert short.length == 11 + seed - 1
        for name, u in general.tensors().items():
            assert torch.equal(short.tensors()[name], u), name
        if not inplace:  # the state that was given is what it was
            assert all(torch.equal(u, before.tensors()[name]) for name, u in kept.tensors().items())


@torch.no_grad()
def test_what_leaves_is_not_overwritten():
    """Whoever takes it may keep it."""
    store = make()
    _, state = store(*inputs(11, seed=1))
    state.inplace = True
    oldest = state.slots.columns(*(store.window.next_slot(11) + i for i in (0, 1))).map(torch.clone)
    _, leaving, after = store.window.push(state.held, store.arrive(*inputs(1, seed=2)[1:]))
    left = leaving.tokens
    assert after.slots.k is state.slots.k, "overwritten"
    assert all(torch.equal(u, left.named()[name]) for name, u in oldest.named().items())


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("memory", "most"), [(True, 125), (False, 14)])
@torch.no_grad()
def test_a_token_takes_few_operations(memory, most):
    """On a CPU they are what a token of a small model waits for: without the short way it is a third more."""
    store = make() if memory else make().without_memory()
    _, state = store(*inputs(11, seed=1))
    state.inplace = True
    with Counting() as operations:
        store(*inputs(1, seed=2), state)
    assert operations.count <= most
