"""Where the Triton forms of the operations run."""

import os
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_INSTALLED = find_spec("triton") is not None
_P = ParamSpec("_P")
_R = TypeVar("_R")


def has_triton(u: Tensor) -> bool:
    """Whether kernels can run on this tensor: it is on a GPU, or Triton's interpreter is on."""
    return _INSTALLED and (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def in_triton(*tensors: Tensor | None) -> bool:
    """Whether a kernel without a backward pass can run on these tensors."""
    given = [u for u in tensors if u is not None]
    return has_triton(given[0]) and not (torch.is_grad_enabled() and any(u.requires_grad for u in given))


def early_launch(u: Tensor) -> dict[str, bool]:
    """Options of a kernel that may start while the one before it ends: programmatic dependent launch, since Hopper.

    If ``EARLY``, a kernel lets the next one start (``gdc_launch_dependents``). One that is launched with these options
    waits for the one before it (``gdc_wait``) in each of its programs; until then it reads nothing still written.
    """
    able = u.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(u.device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


def on_its_gpu(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that starts kernels, with the GPU of its first argument as the current one.

    Triton starts kernels on the current GPU, wherever their tensors are: with several GPUs they would read and write
    out of turn.
    """

    @wraps(launch)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0][0] if isinstance(args[0], tuple) else args[0]
        with torch.cuda.device_of(first):
            return launch(*args, **kwargs)

    return run


OPERATORS: dict[str, Callable[..., Any]] = {}
"""The functions that start kernels, by the names of the operators that they are."""


def operator(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function that starts kernels an operator of PyTorch, on the GPU of its first argument."""

    def make(launch: Callable[..., Any]) -> Any:
        OPERATORS[name] = launch
        return torch.library.custom_op(name, mutates_args=tuple(mutates_args))(on_its_gpu(launch))

    return make
