"""Whether the parts of a cache layer fit together: a file may hold anything."""

from typing import Any

from transformers.cache_utils import LinearAttentionLayer

from .cache_layers import MemoryLayer


def check_loaded(layer: Any, description: dict[str, Any]) -> None:
    """Raise a ValueError unless the parts of a layer fit together."""
    if description["type"] not in ("memory", "sliding", "full", "linear", "none"):
        raise ValueError(
            f"an unknown kind of layer, {description['type']!r}: expected memory, sliding, full, linear or none."
        )
    if "linear" in description:
        _check_linear(layer, description["linear"])
    if isinstance(layer, MemoryLayer):
        _check_memory(layer)
    if isinstance(layer, (MemoryLayer, LinearAttentionLayer)):
        return
    keys, values = layer.keys, layer.values
    if keys is not None and (keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]):
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} of a layer do not fit together.")
    for name in ("sliding_window", "seen") if description["type"] == "sliding" else ():
        if type(description[name]) is not int or description[name] < 0:
            raise ValueError(f"{name}={description[name]!r}: expected a whole number.")


def _check_linear(layer: Any, states: list[dict[str, Any]]) -> None:
    linear = getattr(layer, "linear", layer)
    rows = {layer.state.batch_size} if isinstance(layer, MemoryLayer) and layer.state is not None else set()
    for i, state in enumerate(states):
        width, convolved, recurrent = state["width"], linear.conv_states[i], linear.recurrent_states[i]
        if type(state["begun"]) is not bool or (width is not None and type(width) is not int):
            raise ValueError(f"state {i} of a recurrence, {state!r}: expected a whole number and whether it has begun.")
        if convolved is not None and (convolved.ndim < 3 or convolved.shape[-1] != width):
            raise ValueError(f"conv_states of shape {tuple(convolved.shape)}: expected {width} columns.")
        rows |= {u.shape[0] if u.ndim else 0 for u in (convolved, recurrent) if u is not None}
    if len(rows) > 1:
        raise ValueError(f"parts of a layer with {sorted(rows)} rows: expected the same number.")


def _check_memory(layer: MemoryLayer) -> None:
    if layer.state is None:
        return
    layer.state.check()
    if not isinstance(layer.made_with, str):
        raise ValueError(f"made_with={layer.made_with!r}: expected a text.")
    if layer.padding is None:
        return
    turns, length = layer.padding.turns, layer.state.length or 0
    rising = all(list(row) == sorted(set(row)) for row in turns)
    whole = all(type(turn) is int and 0 <= turn < length for row in turns for turn in row)
    if len(turns) != layer.state.batch_size or not whole or not rising:
        raise ValueError(f"padding={turns!r}: expected rising columns below {length} for each row.")
