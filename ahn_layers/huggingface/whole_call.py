"""The call of a whole model around that of its decoder: what fails after the last layer is undone as well.

Logits are often the largest tensor of a call, so memory runs out there. PyTorch runs no hook after Ctrl-C: behind the
last layer it leaves the tokens in the cache.
"""

import threading
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .transaction import Snapshot


class _Whole:
    """A running call of a whole model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
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


class WholeCallHook:
    """Hooks of a retrofitted model whose decoder is a part of it."""

    def register(self, model: nn.Module) -> None:
        """Hook into the calls of a model."""
        model.register_forward_pre_hook(self.enter)
        model.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """The model is called. A call of it that is still here was interrupted."""
        if torch.compiler.is_compiling():
            return
        stack = _RUNNING.stack
        still_here = [i for i, call in enumerate(stack) if call.module is module]
        _RUNNING.stack = (*(stack[: still_here[0]] if still_here else stack), _Whole(module))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over, or failed: without an output."""
        if torch.compiler.is_compiling() or not _RUNNING.stack or _RUNNING.stack[-1].module is not module:
            return
        call, _RUNNING.stack = _RUNNING.stack[-1], _RUNNING.stack[:-1]
        if output is None and call.done is not None:
            cache, snapshot = call.done
            snapshot.restore(cache)
