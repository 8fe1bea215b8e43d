"""The call of a whole model around that of its decoder: what fails after the last layer is undone as well.

Logits are often the largest tensor of a call, so memory runs out there. PyTorch runs no hook after Ctrl-C: behind the
last layer it leaves the tokens in the cache.
"""

import inspect
import threading
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .transaction import Snapshot


class _Whole:
    """A running call of a whole model."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.positioned = (dict(zip(names, args, strict=False)) | kwargs).get("position_ids") is not None
        self.done: tuple[Cache, Snapshot] | None = None


class _Running(threading.local):
    """What this thread is running, from the outermost model to the innermost."""

    def __init__(self) -> None:
        self.stack: tuple[_Whole, ...] = ()


_RUNNING = _Running()


def hand_over(cache: Cache, snapshot: Snapshot | None) -> None:
    """A decoder has taken its tokens in; if the model around it fails, they are taken back."""
    if _RUNNING.stack and snapshot is not None:
        _RUNNING.stack[-1].done = (cache, snapshot)


def positions_were_given() -> bool:
    """Whether the positions that a decoder is given are the caller's, and not made by the model around it."""
    return not _RUNNING.stack or _RUNNING.stack[-1].positioned


class WholeCallHook:
    """Hooks of a retrofitted model whose decoder is a part of it."""

    def register(self, model: nn.Module) -> None:
        """Hook into the calls of a model."""
        model.register_forward_pre_hook(self.enter, with_kwargs=True)
        model.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called. A call of it that is still here was interrupted."""
        if torch.compiler.is_compiling():
            return
        stack = _RUNNING.stack
        still_here = [i for i, call in enumerate(stack) if call.module is module]
        _RUNNING.stack = (*(stack[: still_here[0]] if still_here else stack), _Whole(module, args, kwargs))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over, or failed: without an output."""
        if torch.compiler.is_compiling() or not _RUNNING.stack or _RUNNING.stack[-1].module is not module:
            return
        call, _RUNNING.stack = _RUNNING.stack[-1], _RUNNING.stack[:-1]
        if output is None and call.done is not None:
            cache, snapshot = call.done
            snapshot.restore(cache)
