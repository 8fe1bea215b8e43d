"""Checks of what ``retrofit`` is asked for, before it looks at the model."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .compressor import Compressor
from .eviction import Eviction


def check_arguments(compressor: Any, options: Mapping[str, Any], eviction: Any) -> None:
    """Raise a TypeError for a compressor that is no class, options that nobody knows, and evictions that are none."""
    if compressor is not None and not (isinstance(compressor, type) and issubclass(compressor, Compressor)):
        given = f"<{type(compressor).__name__} object>" if isinstance(compressor, nn.Module) else repr(compressor)
        raise TypeError(f"compressor={given}: expected a subclass of Compressor (the class, not an object), or None.")
    _check_options(compressor, options)
    for one in eviction.values() if isinstance(eviction, Mapping) else (eviction,):
        if one is not None and not isinstance(one, Eviction):
            raise TypeError(
                f"eviction={one!r}: expected an object of a subclass of Eviction, SalientSlots(384) for instance; a "
                "mapping from layer indices to such objects; or None."
            )


def _check_options(compressor: type[Compressor] | None, options: Mapping[str, Any]) -> None:
    """Options that the compressor does not know are typing errors, most often."""
    known = {} if compressor is None else dict(inspect.signature(compressor).parameters)
    unknown = {name: value for name, value in options.items() if name not in known}
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        name = "None" if compressor is None else compressor.__name__
        raise TypeError(
            f"{', '.join(f'{option}={value!r}' for option, value in unknown.items())}: retrofit knows no such "
            f"argument, and compressor={name} has no such option. Correct its name, or leave it out."
        )
