"""Classes that files refer to by name: two of them cannot share one."""

import gc
from collections.abc import MutableMapping


def register(table: MutableMapping[str, type], cls: type, kind: str) -> None:
    """Enter a class under its name; one that was defined in the same place before is replaced.

    Raises:
        ValueError: if another class has this name.
    """
    if _namesake(table, cls) is not None:
        gc.collect()  # classes are parts of cycles: an unreachable one counts until it is collected
    other = _namesake(table, cls)
    if other is not None:
        raise ValueError(
            f"a second {kind} class is called {cls.__name__!r}: {cls.__module__}.{cls.__qualname__}, after "
            f"{other.__module__}.{other.__qualname__}. Adapter files know a class by its name: choose another one."
        )
    table[cls.__name__] = cls


def _namesake(table: MutableMapping[str, type], cls: type) -> type | None:
    """A class of the same name that was defined elsewhere."""
    other = table.get(cls.__name__)
    same = other is None or (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
    return None if same else other
