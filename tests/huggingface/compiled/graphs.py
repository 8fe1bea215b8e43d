"""Models and stores for the compiler, and a count of the graphs that it makes of them."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import nn

SIZE, HEADS, GROUPS = 8, 4, 2


UNCHECKED: dict[str, Any] = {}
"""The copy of the library that ``models`` stands on: one in a process, since compiled code knows modules by name."""


@pytest.fixture(scope="module")
def models():
    """``tests.models`` over a copy of the library whose shapes are not checked: the checks cannot be traced."""
    checked, finders = _take_out(), sys.meta_path[:]
    sys.meta_path[:] = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
    _put_in(UNCHECKED)
    try:
        yield importlib.import_module("tests.models")
    finally:
        UNCHECKED.update(_take_out())
        sys.meta_path[:] = finders
        _put_in(checked)


def _take_out():
    names = [name for name in sys.modules if name.split(".")[0] == "ahn_layers" or name == "tests.models"]
    return {name: sys.modules.pop(name) for name in names}


def _put_in(modules):
    sys.modules.update(modules)
    if "tests.models" in modules:
        sys.modules["tests"].models = modules["tests.models"]
    if "ahn_layers.huggingface.saved_model" in modules:  # transformers' tables name the classes of one copy
        modules["ahn_layers.huggingface.saved_model"].register()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what it is given, and counts it."""

    def __init__(self):
        self.count = 0
        self.backend = self._compile

    def _compile(self, graph, _):
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo):
        """Configs are copied, the counter is not."""
        return self


def store_and_tokens(ahn, compressor, length=30):
    memory = None if compressor is None else ahn.Compressor.by_name[compressor](16, HEADS, SIZE, num_kv_heads=GROUPS)
    store = ahn.MemoryStore(ahn.Window(5, num_sinks=2), memory).double()
    for parameter in store.parameters():
        nn.init.normal_(parameter, std=0.5)
    sizes = [(2, HEADS, length, SIZE), (2, GROUPS, length, SIZE), (2, GROUPS, length, SIZE), (2, length, 16)]
    return store, [torch.randn(size, dtype=torch.float64) for size in sizes]


def columns(tensors, start, stop):
    return [u[..., start:stop, :] for u in tensors]


def same_states(one, other):
    assert one.description() == other.description()
    for name, u in one.tensors().items():
        torch.testing.assert_close(u, other.tensors()[name], rtol=0, atol=1e-12)
