"""Which form of a scan runs where, and in which dtype its products take their operands: the one place that chooses."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from ..triton_forms import has_triton

_HALF = (torch.bfloat16, torch.float16)
TESTED = ("0", "6")
"""The release whose kernels are tested against the plain forms."""


def _release() -> str:
    """The release that is installed; nothing without Triton, which all of the package needs."""
    try:
        return version("fla-core") if find_spec("fla") and find_spec("triton") else ""
    except PackageNotFoundError:
        return ""


_FOUND = _release()
_said: list[bool] = []


def runs_in_fla(state: Tensor, k: Tensor) -> bool:
    """Whether a scan over these tokens runs in kernels of flash-linear-attention.

    On a GPU in half precision, for more than one token and heads of up to 256. If the package is missing or of another
    release than the tested one, the plain form runs, and a warning says so once.
    """
    fits = k.is_cuda and k.dtype in _HALF and state.dtype == torch.float32
    return (
        fits and k.shape[2] > 1 and max(state.shape[-2:]) <= 256 and (_FOUND.split(".")[:2] == [*TESTED] or _say_once())
    )


def _say_once() -> bool:
    """Warn, at the first scan that would have run in kernels; False."""
    if not _said and not torch.compiler.is_compiling():
        _said.append(True)
        warnings.warn(
            f"fla-core is {_FOUND or 'not installed'}, expected {'.'.join(TESTED)}.x, and triton: compressors that "
            "decay by channel run in plain PyTorch, which is slower. pip install 'fla-core>=0.6,<0.7'",
            stacklevel=4,
        )
    return False


def runs_in_triton(state: Tensor, k: Tensor) -> bool:
    """Whether a scan over these tokens runs in Triton kernels.

    On a GPU in half precision and for heads of more than 32 only: from the exact products of float32, and from very
    small ones, Triton 3.6 makes kernels that read beyond their memory or compute something else.
    """
    sound = not k.is_cuda or (k.dtype in _HALF and min(state.shape[-2:]) > 32)
    return sound and state.dtype == torch.float32 and max(state.shape[-2:]) <= 128 and has_triton(k)


def as_operand(u: Tensor, state: Tensor, *, by_channel: bool = False) -> Tensor:
    """Queries, keys or values ``(B, H, T, D)`` as a scan multiplies them.

    In half precision as they are, where kernels run; else in the dtype of the state, and so are single tokens, and
    float16 in training, whose gradients would vanish.
    """
    half = u.dtype == torch.bfloat16 or (u.dtype == torch.float16 and not torch.is_grad_enabled())
    in_kernels = runs_in_fla if by_channel else runs_in_triton
    return u if half and u.shape[2] > 1 and in_kernels(state, u) else u.to(state.dtype)


def scan_in_triton(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The kernels' scan, arguments as in ``gated_delta_scan``; readings come in the dtype of ``k``."""
    from . import triton_scan, triton_scan_backward

    g, beta = (None if u is None else u.to(state.dtype) for u in (g, beta))
    given = (state, q, k, v, g, beta)
    if torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in given):
        reading, after, *_ = triton_scan_backward.trained_scan(*given)
        return reading, after
    return triton_scan.chunked_scan(*given)
