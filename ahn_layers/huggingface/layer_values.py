"""The contents of a cache layer as tensors and JSON values, for copies and files."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from ..state import MemoryState
from .cache_layers import MemoryLayer
from .native_layer import forget_past
from .padding import Padding


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """Every tensor of a layer by a unique name."""
    held: dict[str, Any] = {name: getattr(layer, name, None) for name in ("keys", "values")}
    if isinstance(layer, MemoryLayer):
        held = {} if layer.state is None else layer.state.tensors()
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, ())
        held |= {f"{name}.{i}": states[i] for i in range(len(states))}
    return {name: u for name, u in held.items() if isinstance(u, Tensor)}


def describe(layer: Any) -> dict[str, Any]:
    """What the tensors alone do not say, as JSON values."""
    if isinstance(layer, MemoryLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin):
        if layer.state is None:
            return {"type": "memory"}
        state = layer.state.description()
        if state["length"] is None:  # a static layer is resumed as a dynamic one
            length = int(layer.get_seq_length())
            state |= {"length": length, "padded": not bool((layer.state.seen == length).all())}
        padding = None if layer.padding is None else layer.padding.turns
        before = {} if layer.padding is None or not layer.padding.before else {"before": layer.padding.before}
        return {"type": "memory", "state": state, "padding": padding, "made_with": layer.made_with} | before
    if type(layer) is DynamicSlidingWindowLayer:
        return {"type": "sliding", "sliding_window": layer.sliding_window, "seen": layer.cumulative_length}
    if type(layer) is DynamicLayer:
        return {"type": "full"}
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be copied or saved here: use copy.deepcopy.")


def rebuild(description: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Inverse of ``describe`` and ``tensors_of``."""
    if description["type"] == "memory":
        layer: Any = MemoryLayer()
        if "state" in description:
            layer.state = MemoryState.from_tensors(tensors, description["state"])
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
