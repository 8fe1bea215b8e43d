"""What jaxtyping's import hook puts around each function: the same checks, for a fraction of the time.

The hook's own decorator binds the arguments of every call to a signature, checks the arguments twice where the result
is annotated too, and makes the checks of a nested function anew whenever it is defined. That took longer than what was
checked. Here arguments are checked once, and nested functions are left to mypy: none of them is annotated with shapes.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from inspect import isclass, isfunction
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype

__name__ = "jaxtyping.checking"
"""``ahn_layers/peft.py`` walks over the stack, past the frames of type checkers, which it knows by this name."""
_as_jaxtyping = jaxtyping.jaxtyped
_scope = _as_jaxtyping("context")
"""Names of axes mean one size within it: the call of one function."""


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Stands in for ``jaxtyping.jaxtyped``, as the import hook calls it."""
    return _checked


def _checked(function: Any) -> Any:
    if is_dataclass(function) and "__init__" in vars(function):
        function.__init__ = _checked(function.__init__)
    if not isfunction(function) or "<locals>" in function.__qualname__ or not function.__annotations__:
        return function
    try:
        annotations = get_type_hints(function, localns={function.__qualname__.partition(".")[0]: Any}).values()
    except NameError:  # imported for mypy alone
        return _as_jaxtyping(function, typechecker=beartype)
    shapes = [shape for annotation in annotations for shape in _shapes(annotation)]
    if any("{" in shape for shape in shapes):  # a size that an argument gives
        return _as_jaxtyping(function, typechecker=beartype)
    checks = beartype(function)
    checks.__globals__.setdefault("__name__", function.__module__)  # beartype 0.20 gives it none

    @wraps(function)
    def with_shapes(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _scope:
            return checks(*args, **kwargs)

    @wraps(function)
    def without_shapes(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checks)(*args, **kwargs)

    return with_shapes if shapes else without_shapes


def _shapes(annotation: Any) -> Iterator[str]:
    if isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        yield annotation.dim_str
    for part in get_args(annotation):
        yield from _shapes(part)
