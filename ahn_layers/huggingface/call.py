"""Which retrofitted model a thread is running: the masks of any other model are none of our business."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config_view import naming


class _Calls(threading.local):
    """What this thread is running, from the outermost call to the innermost: whose model, and which module.

    And the padding mask of the innermost, if it was given a 2-D one.
    """

    stack: tuple[tuple[Any, Any], ...] = ()
    padding: Any = None


_CALLS = _Calls()


def is_running(config: Any) -> bool:
    """Whether this config is a view, and the model that it belongs to is what this thread is running."""
    owner = naming(config)
    return owner is not None and bool(_CALLS.stack) and _CALLS.stack[-1][0] is owner


def padding_mask() -> Tensor | None:
    """False at padding among all tokens of the running call, past and new; None if it was given no such mask."""
    mask = _CALLS.padding
    return None if mask is None or bool(mask.all()) else mask.to(torch.bool)


@contextmanager
def running(owner: Any, module: Any = None) -> Iterator[None]:
    """Within this context, the masks that are made are those of this model."""
    before = _CALLS.stack
    _CALLS.stack = (*before, (owner, module))
    try:
        yield
    finally:
        _CALLS.stack = before


class ForwardHook:
    """Hooks of a module that makes masks: they surround each of its calls.

    An object and not functions, so that the model can still be pickled and copied.

    Args:
        owner: the record of the retrofitted model.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def register(self, module: nn.Module) -> None:
        """Hook into the calls of a module."""
        module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The module is called. A call of the same module that is still here was interrupted."""
        stack = _CALLS.stack
        open_calls = [i for i, (_, running) in enumerate(stack) if running is module]
        _CALLS.stack = (*(stack[: open_calls[0]] if open_calls else stack), (self.owner, module))
        mask = kwargs.get("attention_mask")
        _CALLS.padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over, or failed, perhaps before it was announced."""
        if _CALLS.stack and _CALLS.stack[-1][1] is module:
            _CALLS.stack, _CALLS.padding = _CALLS.stack[:-1], None


def remove_hooks(model: nn.Module) -> None:
    """Take every [`ForwardHook`][ahn_layers.huggingface.call.ForwardHook] out of a model."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
            (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), ForwardHook)]:
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)
