"""Changes to a model that are undone: after an error, or at the end."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Within this context, any exception (Ctrl-C too) puts back the modules of the model as they were.

    Children, hooks and attributes of every module are put back, and those of its config. Values of parameters are not:
    code that writes into them keeps the old ones.
    """
    objects: dict[int, Any] = {}
    for module in model.modules():
        objects[id(module)] = module
        config = module.__dict__.get("config")
        if hasattr(config, "__dict__"):
            objects[id(config)] = config
    before = [(u, dict(u.__dict__), _contents(u)) for u in objects.values()]
    try:
        yield
    except BaseException:
        for u, attributes, contents in before:
            u.__dict__.clear()
            u.__dict__.update(attributes)
            for name, items in contents.items():  # the same dictionary, which other objects may share
                attributes[name].clear()
                attributes[name].update(items)
        raise


def _contents(u: Any) -> dict[str, Any]:
    """What the dictionaries among the attributes hold: children, parameters, hooks."""
    return {name: value.copy() for name, value in u.__dict__.items() if isinstance(value, dict)}


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within this context, hooks are there, which are registered as it begins."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
