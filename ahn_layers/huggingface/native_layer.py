"""Saves cache layers of transformers before a call, and puts them back."""

from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SHARING: tuple[type, ...] = tuple(u for u in (getattr(cache_utils, "DummyLayer", None),) if u is not None)
"""Layers whose keys and values come from another layer; transformers 5.17 has none."""
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of transformers that put new tensors in the place of the old ones, so that these can be put back."""


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


def _stamps(layer: Any) -> list[tuple[int, int]]:
    """Which tensors a layer holds, and how often each has been written to."""
    held: list[Any] = []
    for value in vars(layer).values():
        held += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
    tensors = [u for u in held if isinstance(u, Tensor)]
    return [(id(u), -1 if u.is_inference() else u._version) for u in tensors]
