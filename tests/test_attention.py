"""A custom block in :class:`HippocampalAttention`: shared parameters, one changed line, errors that change nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahn_layers import GatedDeltaNet, HippocampalAttention, MemoryStore, Window

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """A block as a user would write it; without ``attend`` it is plain causal attention."""

    def __init__(self, calls=1):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("temperature", torch.ones(()))
        self.calls, self.label = calls, "custom"

    def forward(self, x, attend=None, shift=0.0):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = torch.zeros_like(q)
        for _ in range(self.calls):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if attend is None else attend(q, k, v)
        y = F.dropout(y, 0.5, self.training)
        return self.out(y.transpose(1, 2).flatten(2)) * self.temperature + shift


def make(block=None, window=6, trained=True):
    memory = GatedDeltaNet(WIDTH, HEADS, WIDTH // HEADS)
    if trained:
        nn.init.normal_(memory.o_proj.weight)
    block = Attention().eval() if block is None else block
    return block, HippocampalAttention(block, MemoryStore(Window(window, num_sinks=2), memory))


def test_inside_the_window_it_is_the_block():
    block, layer = make(window=30)
    x = torch.randn(2, 20, WIDTH)
    out, state = layer(x)
    torch.testing.assert_close(out, block(x))
    assert state.length == 20


def test_state_goes_in_and_out():
    _, layer = make()
    x = torch.randn(2, 20, WIDTH)
    whole, end = layer(x)
    state, outs = None, []
    for part in x.split([3, 1, 1, 9, 6], dim=1):
        out, state = layer(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    torch.testing.assert_close(state.memory, end.memory)


def test_padding_mode_and_arguments_of_the_block():
    _, layer = make()
    x, valid = torch.randn(1, 20, WIDTH), torch.ones(1, 20, dtype=torch.bool)
    valid[:, :5] = False
    padded, _ = layer(x, valid=valid, shift=1.0)
    alone, _ = layer(x[:, 5:], shift=1.0)
    torch.testing.assert_close(padded[:, 5:], alone)
    without, state = layer(x, use_memory=False)
    assert state.memory is None and not torch.allclose(without, layer(x)[0])


def test_parameters_are_shared_under_their_own_names():
    block, layer = make()
    base = set(Attention().state_dict())
    assert {name for name in layer.state_dict() if not name.startswith("memory.")} == base
    assert layer.get_parameter("qkv.weight") is block.qkv.weight
    layer.double()
    assert block.qkv.weight.dtype == torch.float64
    layer.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # as adapters of other libraries replace children
    assert block.qkv is layer.qkv
    assert layer.label == "custom" and layer.calls == 1
    with pytest.raises(AttributeError):
        layer.nothing_of_the_kind  # noqa: B018


def test_training_mode_reaches_the_block():
    block, layer = make()
    assert not layer.training
    layer.train()
    assert block.training and layer.memory.training
    layer.eval()
    assert not block.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole_and_independent(duplicate):
    _, layer = make()
    x = torch.randn(1, 20, WIDTH)
    expected, _ = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x)[0], expected)
    assert other.block.qkv is other.qkv and other.qkv is not layer.qkv
    with torch.no_grad():
        other.qkv.weight.zero_()
    assert torch.equal(layer(x)[0], expected) and not torch.equal(other(x)[0], expected)


def test_unwrap_gives_the_block_back():
    block, layer = make()
    assert layer.unwrap() is block
    assert set(block.state_dict()) == set(Attention().state_dict())
    HippocampalAttention(block, MemoryStore(Window(4)))


@pytest.mark.parametrize("calls, message", [(0, "did not call attend"), (2, "called attend twice")])
def test_a_block_must_attend_once(calls, message):
    _, layer = make()
    _, state = layer(torch.randn(1, 20, WIDTH))
    before = state.clone().tensors()
    layer.block.calls = calls
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(1, 1, WIDTH), state)
    assert all(torch.equal(u, before[name]) for name, u in state.tensors().items())


def test_wrapping_twice_and_a_taken_name_are_refused():
    _, layer = make()
    with pytest.raises(ValueError, match="HippocampalAttention already"):
        HippocampalAttention(layer, MemoryStore(Window(4)))
    block = Attention()
    block.memory = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has an attribute 'memory'"):
        HippocampalAttention(block, MemoryStore(Window(4)))


def test_the_memory_learns():
    """Gradients of a loss beyond the window reach the memory and, through the state, early tokens."""
    _, layer = make()
    x = torch.randn(1, 20, WIDTH, requires_grad=True)
    out, _ = layer(x)
    out[:, -1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.memory.parameters())
    assert x.grad[:, 5].any()
