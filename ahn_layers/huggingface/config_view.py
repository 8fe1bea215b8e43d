"""Private views of a config, which a retrofitted model's modules hold in place of the shared object.

A model looks its attention function up by the name ``config._attn_implementation``, and models share config objects.
The modules of a retrofitted model that make masks, and its retrofitted blocks, hold a view: it has the class, the
attributes and the sub-configs of the original, also those that are set later, and names another attention function.
"""

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedConfig

PREFIX = "hippocampal:"
"""How the names of our attention functions begin, see ``ahn_layers.huggingface.interface``."""


@runtime_checkable
class Naming(Protocol):
    """Decides what the views of a model answer."""

    def attention_name(self, base: str | None) -> str | None:
        """The attention function to use, where the original names ``base``."""


class ConfigView:
    """What the class of a view has beside the class of its original.

    Reads and writes go to the attributes of the original. The name of our own attention function is never written
    there: it may come from a model that was made from a view.
    """

    __slots__ = ()
    _view_of: Any
    _naming: Naming
    _renamed: bool
    _parts: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An ordinary config, where code calls the class of a config that it was given."""
        return _original_class(cls)(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing to prepare: the original's class has made the fields."""

    @property
    def _attn_implementation(self) -> Any:
        base = self._view_of._attn_implementation
        return self._naming.attention_name(base_name(base)) if self._renamed else base

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._view_of._attn_implementation = base_name(value)

    @property
    def output_attentions(self) -> Any:
        """As the original, whose attention function it depends on."""
        return self._view_of.output_attentions

    @output_attentions.setter
    def output_attentions(self, value: Any) -> None:
        self._view_of.output_attentions = value

    def validate_output_attentions(self) -> None:
        """As the original, whose attention function it depends on."""
        self._view_of.validate_output_attentions()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it in the original."""
        super().__setattr__(name, base_name(value) if name == "_attn_implementation_internal" else value)

    def __eq__(self, other: object) -> bool:
        """Whether the originals are equal."""
        return bool(self._view_of == original(other))

    __hash__ = None  # type: ignore[assignment]  # as configs

    def __copy__(self) -> Any:
        """A copy of the original."""
        return copy.copy(self._view_of)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A view of the copy's config, where a retrofitted model is copied; alone, a copy of the original."""
        config = copy.deepcopy(self._view_of, memo)
        if id(self._naming) not in memo:
            return config
        return _rebuild(config, memo[id(self._naming)], self._renamed, copy.deepcopy(self._parts, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A view again, in another process too."""
        return _rebuild, (self._view_of, self._naming, self._renamed, self._parts)


def base_name(name: Any) -> Any:
    """The base implementation in a name of ours, also in names by sub-config; any other value as it is."""
    if isinstance(name, dict):
        return {part: base_name(u) for part, u in name.items()}
    return name.split(":")[1] if isinstance(name, str) and name.startswith(PREFIX) else name


def original(config: Any) -> Any:
    """The config behind a view; any other object is returned as it is."""
    return config._view_of if isinstance(config, ConfigView) else config


def naming(config: Any) -> Naming | None:
    """What decides about this view, None for any other object."""
    return config._naming if isinstance(config, ConfigView) else None


def view(config: Any, naming: Naming, renamed: Callable[[Any], bool]) -> Any:
    """A view of a config, in which it and its sub-configs have another attention function where ``renamed`` says so.

    Returns:
        The view; the original itself if there is nothing to rename.
    """
    config = original(config)
    parts = {name: view(u, naming, renamed) for name, u in vars(config).items() if isinstance(u, PreTrainedConfig)}
    parts = {name: part for name, part in parts.items() if isinstance(part, ConfigView)}
    own = renamed(config)
    return _rebuild(config, naming, own, parts) if own or parts else config


def configs_of(module: nn.Module) -> dict[str, Any]:
    """The configs that a module holds, by the names of its attributes."""
    return {name: u for name, u in vars(module).items() if isinstance(u, PreTrainedConfig)}


def give_views(modules: Iterable[nn.Module], naming: Naming, renamed: Callable[[Any], bool]) -> None:
    """Let modules hold views of their configs, see [`view`][ahn_layers.huggingface.config_view.view]."""
    for module in modules:
        vars(module).update({name: view(u, naming, renamed) for name, u in configs_of(module).items()})


def take_views(modules: Iterable[nn.Module], naming: Naming) -> None:
    """Give modules the originals back."""
    for module in modules:
        for name, config in configs_of(module).items():
            if isinstance(config, ConfigView) and config._naming is naming:
                vars(module)[name] = config._view_of


def _rebuild(config: Any, naming: Naming, renamed: bool, parts: dict[str, Any]) -> Any:
    from .interface import register_functions  # which knows calls, which know views

    register_functions()
    cls: Any = type(config)
    made: Any = object.__new__(_view_class(cls, tuple(sorted(parts))))
    for name, value in (("_view_of", config), ("_naming", naming), ("_renamed", renamed), ("_parts", parts)):
        object.__setattr__(made, name, value)
    object.__setattr__(made, "__dict__", vars(config))
    return made


@cache
def _view_class(cls: type, parts: tuple[str, ...]) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    slots = ("_view_of", "_naming", "_renamed", "_parts")
    return type(cls.__name__, (ConfigView, cls), {"__slots__": slots, **names, **{name: _part(name) for name in parts}})


def _original_class(cls: type) -> type:
    return next(base for base in cls.__mro__[1:] if not issubclass(base, ConfigView))


def _part(name: str) -> property:
    """A sub-config: its view, as long as the original holds the config that this is a view of."""

    def get(self: Any) -> Any:
        held = vars(self)[name]
        return self._parts[name] if self._parts[name]._view_of is held else held

    def set_it(self: Any, value: Any) -> None:
        vars(self)[name] = original(value)

    return property(get, set_it)
