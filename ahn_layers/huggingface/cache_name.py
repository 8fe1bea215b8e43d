"""Lets a retrofitted model take its cache as ``cache=`` in all supported versions of transformers.

Before transformers 5.24 it is ``past_key_values``: a model would ignore ``cache``, and ``generate`` refuse it.
"""

from typing import Any

from torch import nn

from .decoder import CACHE
from .model_method import ModelMethod

NAME = "cache"
"""The name since transformers 5.24."""


class PrepareConfig(ModelMethod):
    """Stands in for ``model._prepare_generation_config``, the first method that sees the arguments of ``generate``."""

    def __call__(self, generation_config: Any, **kwargs: Any) -> Any:
        """What the model's own method does, for the renamed arguments."""
        model: Any = self.model
        return type(model)._prepare_generation_config(model, generation_config, **renamed(kwargs))


def accept_cache(model: Any) -> None:
    """Let ``model(..., cache=...)`` and ``model.generate(..., cache=...)`` work on an older transformers."""
    if CACHE != NAME:
        model._prepare_generation_config = PrepareConfig(model)
        model._takes_cache = model.register_forward_pre_hook(rename_cache, with_kwargs=True)


def refuse_cache(model: Any) -> None:
    """Undo ``accept_cache``."""
    if CACHE != NAME:
        model._takes_cache.remove()
        del model._takes_cache, model._prepare_generation_config


def rename_cache(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward pre-hook."""
    return args, renamed(kwargs)


def renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, the cache under the name that the installed transformers knows.

    Raises:
        TypeError: if there are two caches.
    """
    if NAME not in kwargs or CACHE == NAME:
        return kwargs
    if kwargs.get(CACHE) is not None:
        raise TypeError(f"cache and {CACHE} were both passed, and are the same argument: pass cache alone.")
    return {CACHE if name == NAME else name: value for name, value in kwargs.items() if name != CACHE}
