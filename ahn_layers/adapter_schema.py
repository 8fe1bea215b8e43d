"""Whether the description of an adapter is well formed: a file may hold anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from .files import sha256
from .fingerprint import DTYPES, VALUES
from .positions import MemoryPositions
from .window import SinkPositions

CHECKSUM = "description_sha256"
"""Among what a description says: the hash of all the rest."""


def with_checksum(description: dict[str, Any]) -> dict[str, Any]:
    """A description that tells whether it was changed."""
    return description | {CHECKSUM: checksum(description)}


def checksum(description: dict[str, Any]) -> str:
    """The hash of a description, without the one that it holds."""
    rest = {name: value for name, value in description.items() if name != CHECKSUM}
    as_read = json.loads(json.dumps(rest))  # layer 10 comes before layer 9, as in every file: keys are texts there
    return sha256(json.dumps(as_read, sort_keys=True).encode())


def check_checksum(description: dict[str, Any], path: str | Path) -> None:
    """Raise a ValueError if a description is not what was written."""
    if description.get(CHECKSUM) not in (None, checksum(description)):
        raise ValueError(
            f"{path}: damaged, or changed by hand ({CHECKSUM}). Save the adapter again, or, to keep a change that you "
            f"made, remove the entry {CHECKSUM!r}."
        )


def check_schema(description: dict[str, Any], path: str | Path) -> None:
    """Raise a ValueError if a value is of the wrong kind."""
    for name, (fits, expected) in _SCHEMA.items():
        if name in description and not fits(description[name]):
            value = repr(description[name])
            shown = value if len(value) < 80 else f"{value[:80]}…"
            raise ValueError(f"{path}: {name}={shown}, expected {expected}.")


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _by_layer(value: Any, least: int) -> bool:
    """A size for all layers, or by layer."""
    sizes = value if isinstance(value, dict) else {"0": value}
    return len(sizes) > 0 and all(str(i).isdigit() and _whole(size) and size >= least for i, size in sizes.items())


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_whole, value)) and len(set(value)) == len(value)


def _options(value: Any) -> bool:
    return isinstance(value, dict)


def _sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(_whole(size) for size in value.values())


def _evictions(value: Any) -> bool:
    """Each layer has one policy at most."""
    kinds = {"eviction": _text, "options": _options, "layers": _indices}
    each = isinstance(value, list) and all(
        isinstance(one, dict) and one.keys() == kinds.keys() and all(fits(one[name]) for name, fits in kinds.items())
        for one in value
    )
    layers = [layer for one in value for layer in one["layers"]] if each else []
    return each and len(set(layers)) == len(layers)


def _base(value: Any) -> bool:
    """A fingerprint: facts, and samples of weights."""
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return False
    weights = value.get("weights")
    return isinstance(weights, dict) and all(isinstance(u, dict) and _sample(**u) for u in weights.values())


def _sample(dtype: Any = None, shape: Any = None, values: Any = None, **_: Any) -> bool:
    """Of a weight: its dtype, its shape, and some values."""
    try:
        return dtype in DTYPES and isinstance(shape, list) and len([float(u) for u in values.split()]) == VALUES
    except (AttributeError, TypeError, ValueError):
        return False


_SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "compressor": (_maybe(_text), "the name of a class, or null"),
    "compressor_options": (_options, "arguments by name"),
    "window_size": (lambda value: _by_layer(value, 1), "a whole number of at least 1, or one for each layer"),
    "num_sinks": (lambda value: _by_layer(value, 0), "a whole number, or one for each layer"),
    "sink_positions": (get_args(SinkPositions).__contains__, f"one of {get_args(SinkPositions)}"),
    "memory_positions": (get_args(MemoryPositions).__contains__, f"one of {get_args(MemoryPositions)}"),
    "layers": (_indices, "different whole numbers"),
    "sizes": (_maybe(_sizes), "whole numbers by name, or null"),
    "base_model_type": (_text, "a text"),
    "evictions": (_evictions, "a list of eviction, options and layers"),
    "base": (_base, "config and weights"),
}
