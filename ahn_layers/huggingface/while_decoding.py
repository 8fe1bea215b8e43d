"""A cache that outlives ``generate`` has fixed addresses while it decodes, so that a step can be recorded.

Before and after, its layers grow with the text as ever: the prompt is read and tokens are taken back as in any cache.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

from .decoder import CACHE, DecoderAttention
from .fixed import fix, release
from .model_method import ModelMethod
from .reconcile import length_of

_ASKED = "_hippocampal_fixes"


class _Next(threading.local):
    """What this thread decodes with next: the model that has read a prompt, and its cache."""

    model: nn.Module | None = None
    cache: Any = None


_NEXT = _Next()


def ask(generation_config: Any) -> None:
    """Let the ``generate`` of this config decode with its cache at fixed addresses."""
    setattr(generation_config, _ASKED, True)


def is_asked(generation_config: Any) -> bool:
    """Whether ``ask`` was called for this config."""
    return getattr(generation_config, _ASKED, False)


def note_read(model: nn.Module, generation_config: Any, cache: Any) -> None:
    """A prompt has been read into this cache; decoding is next."""
    _NEXT.model, _NEXT.cache = model, cache if is_asked(generation_config) else None


class CompileCriteria(ModelMethod):
    """Stands in for ``model._valid_auto_compile_criteria``: asked before the prompt is read, about what comes after."""

    def __call__(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Whether steps are compiled."""
        model: Any = self.model
        if is_asked(generation_config):
            model_kwargs = model_kwargs | {CACHE: SimpleNamespace(is_compileable=True)}
        valid: bool = type(model)._valid_auto_compile_criteria(model, model_kwargs, generation_config)
        return valid


class WhileDecoding(ModelMethod):
    """Stands in for ``model._optimize_model_for_decode``, the context in which ``generate`` decodes."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The model's own context, and fixed addresses inside it."""
        model: Any = self.model
        cache = _NEXT.cache if _NEXT.model is model else None
        _NEXT.model = _NEXT.cache = None
        with type(model)._optimize_model_for_decode(model):
            if cache is None:
                yield
                return
            try:
                fix(cache)
                yield
            finally:
                release(cache)
            length = length_of(cache)
            for module in model.modules():
                if isinstance(module, DecoderAttention):
                    module.warn_if_far(length)  # recorded steps warn of nothing
