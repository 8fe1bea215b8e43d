"""What a memory store is, as a text: what its weights do not show, by which states and caches are compared."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from .compressor import Compressor
from .files import digest


def kind_of(store: Any) -> str:
    """Compressor and eviction with their options, and what the memory is told of positions.

    Args:
        store: a ``MemoryStore``; of any other module nothing is said.
    """
    if not hasattr(store, "eviction"):
        return ""
    compressor = None if store.compressor is None else f"{type(store.recalling).__name__}{_options_of(store.recalling)}"
    return f"{compressor} {store.memory_positions} {_described(store.eviction)}"


def maker(store: nn.Module | None) -> dict[str, Any]:
    """What the file of a state says of the store that made it, as JSON values."""
    if store is None:
        return {"made_with": None}
    return {"made_with": digest(store.named_parameters()), "made_by": kind_of(store)}


def check_maker(path: str | Path, description: dict[str, Any], store: nn.Module) -> None:
    """Raise a ValueError if the file of a state says that another store made it."""
    made_with, made_by = description.get("made_with"), description.get("made_by")
    if made_by is not None and made_by != kind_of(store):
        raise ValueError(
            f"{path}: the state was made by {made_by!r}, this store is {kind_of(store)!r} (compressor, "
            "memory_positions and eviction with their options). Make the store as it was, or begin with state=None."
        )
    if made_with is not None and made_with != digest(store.named_parameters()):
        raise ValueError(
            f"{path}: the state was made with other weights than this store has. Load the weights that it was made "
            "with, or begin with state=None."
        )


def _options_of(compressor: Compressor) -> str:
    """What a compressor was made with beside its sizes: rates, say."""
    known = inspect.signature(Compressor.__init__).parameters
    own = inspect.signature(type(compressor).__init__).parameters.values()
    named = [p for p in own if p.name not in known and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    options = {p.name: getattr(compressor, p.name, p.default) for p in named}
    return f" {options}" if options else ""


def _described(eviction: Any) -> str:
    """An eviction with its options, if it can tell them."""
    try:
        return f"{type(eviction).__name__} {eviction.options()}"
    except (AttributeError, ValueError):
        return type(eviction).__name__
