"""The kernels that a long prompt needs, compiled while its first pieces are read."""

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..memory import MemoryStore
from ..ops.ahead import compile_ahead
from .devices import only_device

_begun: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
"""For which memories of each model the kernels have been asked for."""


def compile_for(model: Any, stores: Iterable[MemoryStore], rows: int, length: int, size: int) -> None:
    """Begin, at the first prompt of a model that outgrows the window, to compile what it launches.

    Nothing happens but for a model in half precision on one CUDA GPU.

    Args:
        model: the retrofitted model.
        stores: its memories.
        rows: prompts that are read together.
        length: tokens of each.
        size: tokens of each that are read at a time.
    """
    device = only_device(model)
    if device is None or device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return
    alike = {repr(store): store for store in stores if store.recalling is not None and store.split is None}
    begun = _begun.setdefault(model, set())
    for name in alike.keys() - begun:
        begun.add(name)
        lengths = pieces(length, size, alike[name].window.capacity)
        compile_ahead(partial(read, alike[name], device, model.dtype, rows, lengths), device)


def pieces(length: int, size: int, capacity: int) -> list[int]:
    """Lengths of pieces that together launch what those of the prompt do: two with a full window, and the last."""
    whole, rest = min(length // size, -(-capacity // size) + 2), length % size
    return [size] * whole + [rest] * (rest > 0)


def read(store: MemoryStore, device: torch.device, dtype: torch.dtype, rows: int, lengths: list[int]) -> None:
    """Read pieces of these lengths with a copy of a store, on new tensors."""
    store, state = _copy(store, device), None
    compressor = store.recalling
    assert compressor is not None
    heads, groups, size = compressor.num_heads, compressor.num_kv_heads, compressor.head_dim
    for length in lengths:
        q, k, v = (
            torch.empty(rows, length, count, width, dtype=dtype, device=device).transpose(1, 2)
            for count, width in ((heads, size), (groups, size), (groups, compressor.value_dim))
        )
        x = torch.empty(rows, length, compressor.hidden_size, dtype=dtype, device=device)
        _, state = store(q, k, v, x, state)


def _copy(store: MemoryStore, device: torch.device) -> MemoryStore:
    """A store with new weights and without hooks: whatever a run changes or tells is not the model's."""
    weights = (*store.parameters(), *store.buffers())
    copied = copy.deepcopy(store, {id(u): _like(u, device) for u in weights}).eval()
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


def _like(u: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(u.shape, u.stride(), dtype=u.dtype, device=device)
