"""What is done to a cache is done to all of its layers, or to none."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .cache_layers import MemoryLayer
from .static_layer import StaticMemoryLayer


@contextmanager
def all_or_none(layers: Sequence[Any]) -> Iterator[None]:
    """If a layer refuses what is done to them inside, those before it are put back.

    For what puts new tensors in the place of the old ones: taking tokens back, choosing rows.
    """
    parts = [part for layer in layers for part in (layer, getattr(layer, "linear", None)) if part is not None]
    saved = [{name: _copy(value) for name, value in vars(part).items()} for part in parts]
    try:
        yield
    except BaseException:
        for part, attributes in zip(parts, saved, strict=True):
            vars(part).clear()
            vars(part).update(attributes)
        raise


def refuse_reset(layers: Sequence[Any]) -> Sequence[Any]:
    """The layers; or a RuntimeError, before any has forgotten anything, if one of them cannot be emptied."""
    for layer in layers:
        if isinstance(layer, StaticMemoryLayer):
            layer.refuse_reset()
    return layers


def refuse_uneven(cache: Any) -> None:
    """Raise a RuntimeError if layers of a cache hold different numbers of columns.

    A cache of transformers asks its layers one after the other to take tokens back, and one of them may refuse.
    """
    growing = [u for u in getattr(cache, "layers", ()) if isinstance(u, MemoryLayer) and u.grows]
    lengths = {layer.state.length for layer in growing if layer.state is not None}
    if len(lengths) > 1:
        raise RuntimeError(
            f"the layers of this {type(cache).__name__} hold different numbers of tokens ({sorted(lengths, key=str)}): "
            "some of them took tokens back (crop) and others refused, or two threads use it at once. Begin a new cache "
            "for each; a HippocampalCache stays as it was if a layer refuses."
        )


def refuse_masks(rows: int | Iterable[int] | Tensor) -> None:
    """Raise a TypeError for what is no number of a row: a boolean mask would be read as the numbers 0 and 1."""
    values = rows.flatten().tolist() if isinstance(rows, Tensor) else [rows] if isinstance(rows, int) else rows
    wrong = [value for value in values if isinstance(value, (bool, float))]
    if wrong:
        raise TypeError(f"rows={wrong}: expected whole numbers of rows. Pass mask.nonzero().flatten() for a mask.")


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value
