"""The contents of a cache layer as tensors and JSON values, for copies and files."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from ..state import MemoryState
from .cache_layers import MemoryLayer
from .hybrid_layer import HybridMemoryLayer
from .linear_rows import STATES as _STATES
from .native_layer import SHARING, forget_past
from .padding import Padding


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """Every tensor of a layer by a unique name."""
    if isinstance(layer, MemoryLayer):
        linear = getattr(layer, "linear", None)
        own = {} if layer.state is None else layer.state.tensors()
        return own if linear is None else own | tensors_of(linear)
    held = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in _STATES:
        states = getattr(layer, name, ())
        held |= {f"{name}.{i}": states[i] for i in range(len(states))}
    return {name: u for name, u in held.items() if isinstance(u, Tensor)}


def describe(layer: Any) -> dict[str, Any]:
    """What the tensors alone do not say, as JSON values."""
    if isinstance(layer, MemoryLayer):
        linear = getattr(layer, "linear", None)
        beside = {} if linear is None else {"linear": _describe_linear(linear)}
        if layer.state is None:
            return {"type": "memory"} | beside
        state = layer.state.description()
        if state["length"] is None:  # a static layer is resumed as a dynamic one
            length = int(layer.get_seq_length())
            state |= {"length": length, "padded": not bool((layer.state.seen == length).all())}
        padding = None if layer.padding is None else layer.padding.turns
        before = {} if layer.padding is None or not layer.padding.before else {"before": layer.padding.before}
        described = {"type": "memory", "state": state, "padding": padding, "made_with": layer.made_with}
        return described | before | beside
    if type(layer) is DynamicSlidingWindowLayer:
        return {"type": "sliding", "sliding_window": layer.sliding_window, "seen": layer.cumulative_length}
    if type(layer) is DynamicLayer:
        return {"type": "full"}
    if type(layer) is LinearAttentionLayer and not layer.record_past:
        return {"type": "linear", "linear": _describe_linear(layer)}
    if type(layer) in SHARING:
        return {"type": "none"}
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be copied or saved here: use copy.deepcopy.")


def _describe_linear(layer: LinearAttentionLayer) -> list[dict[str, Any]]:
    """Of a convolution or recurrence: for each of its states the width of the convolution, and whether it has begun."""
    return [
        {"width": layer.conv_kernel_size[i], "begun": layer.has_previous_state[i]}
        for i in range(layer.number_of_states)
    ]


def rebuild(description: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Inverse of ``describe`` and ``tensors_of``."""
    if description["type"] == "none":
        return SHARING[0]() if SHARING else LinearAttentionLayer()  # which stands for layers without states there
    if description["type"] == "linear":
        return _rebuild_linear(description["linear"], tensors)
    if description["type"] == "memory":
        layer: Any = MemoryLayer()
        if "linear" in description:
            layer = HybridMemoryLayer(_rebuild_linear(description["linear"], tensors))
        if "state" in description:
            layer.state = MemoryState.from_tensors(
                {name: u for name, u in tensors.items() if not name.startswith(_STATES)}, description["state"]
            )
            layer.made_with, turns = description.get("made_with", ""), description.get("padding")
            before = tuple(description.get("before", ()))
            layer.padding = None if turns is None else Padding(tuple(tuple(row) for row in turns), before)
        return layer
    sliding = description["type"] == "sliding"
    layer = DynamicSlidingWindowLayer(description["sliding_window"]) if sliding else DynamicLayer()
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
    if sliding:
        layer.cumulative_length = description["seen"]
        forget_past([layer])
    return layer


def _rebuild_linear(states: list[dict[str, Any]], tensors: dict[str, Tensor]) -> LinearAttentionLayer:
    layer = LinearAttentionLayer(number_of_states=len(states))
    for i, state in enumerate(states):
        layer.conv_kernel_size[i], layer.has_previous_state[i] = state["width"], state["begun"]
        for name in _STATES:
            if (u := tensors.get(f"{name}.{i}")) is not None:
                getattr(layer, name)[i], getattr(layer, f"is_{name}_initialized")[i] = u, True
                if layer.device is None:
                    layer.dtype, layer.device = u.dtype, u.device
    return layer
