"""Saves cache layers of transformers before a call, and puts them back."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

SHARING: tuple[type, ...] = tuple(u for u in (getattr(cache_utils, "DummyLayer", None),) if u is not None)
"""Layers whose keys and values come from another layer; transformers 5.17 has none."""
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of transformers that put new tensors in the place of the old ones, so that these can be put back."""


def reads_in_pieces(layer: Any) -> bool:
    """Whether a layer of transformers reads a prompt in pieces as at once: one that picks keys by an index may not."""
    kind = type(layer).__name__
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
    return type(layer) in SHARING or kind in plain or kind.startswith("LinearAttention")


def save(layer: Any) -> Any:
    """What ``put_back`` needs."""
    attributes: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()
    }
    if type(layer) is DynamicLayer and layer.is_initialized:  # which appends: its old tensors need not be held
        attributes["length"] = attributes.pop("keys").shape[-2]
        del attributes["values"]
    return attributes, _stamps(layer)


def put_back(layer: Any, saved: Any) -> bool:
    """Make a layer what it was.

    Returns:
        Whether that was possible: not where the call has written into tensors that were there before.
    """
    attributes, stamps = dict(saved[0]), saved[1]
    if type(layer) in _GROWING or not stamps:
        if "length" in attributes:
            length = attributes.pop("length")
            attributes |= {name: getattr(layer, name)[..., :length, :] for name in ("keys", "values")}
        vars(layer).clear()
        vars(layer).update(attributes)
        return True
    return _stamps(layer) == stamps


def forget_past(layers: Iterable[Any]) -> None:
    """Leave what sliding layers see of the past, and no more: in copies and new rows nothing earlier was recorded."""
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
            visible = slice(-layer.sliding_window + 1, None)  # as they cut it themselves
            layer.keys, layer.values = layer.keys[:, :, visible], layer.values[:, :, visible]


def refuse_gaps(layers: Sequence[Any]) -> None:
    """Raise a RuntimeError if a layer has taken back tokens before which it has not kept what it would see."""
    length = max((int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")), default=0)
    for i, layer in enumerate(layers):
        if type(layer) is LinearAttentionLayer:
            for k, states in layer.conv_states.items():
                needed = 0 if states is None else min(length, layer.conv_kernel_size[k] or 0)
                if states is not None and states.shape[-1] < needed:
                    raise RuntimeError(
                        f"crop: layer {i}, a convolution, would hold {states.shape[-1]} of the {needed} tokens that it "
                        "sees, since the older ones were not recorded. Call cache.activate_past_recording() before the "
                        "tokens to be taken back, or clone the cache and go back to the clone."
                    )
        if type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
            held, seen = layer.keys.shape[-2], min(layer.cumulative_length, layer.sliding_window - 1)
            if held < seen:
                raise RuntimeError(
                    f"crop: layer {i}, which is not retrofitted, would hold {held} of the {seen} tokens in its sliding "
                    "window, since the older ones were not recorded. Call cache.activate_past_recording() before the "
                    "tokens to be taken back, or clone the cache and go back to the clone."
                )


def _stamps(layer: Any) -> list[tuple[int, int]]:
    """Which tensors a layer holds, and how often each has been written to."""
    held: list[Any] = []
    for value in vars(layer).values():
        held += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
    tensors = [u for u in held if isinstance(u, Tensor)]
    return [(id(u), -1 if u.is_inference() else u._version) for u in tensors]
