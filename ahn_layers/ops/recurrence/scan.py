"""Which form of a chunked scan runs, and in which dtype its products take their operands."""

import torch
from torch import Tensor

from ..triton_forms import has_triton

_HALF = (torch.bfloat16, torch.float16)


def runs_in_triton(state: Tensor, k: Tensor) -> bool:
    """Whether a scan over these tokens runs in Triton kernels.

    On a GPU in half precision and for heads of more than 32 only: from the exact products of float32, and from very
    small ones, Triton 3.6 makes kernels that read beyond their memory or compute something else.
    """
    sound = not k.is_cuda or (k.dtype in _HALF and min(state.shape[-2:]) > 32)
    return sound and state.dtype == torch.float32 and max(state.shape[-2:]) <= 128 and has_triton(k)


def as_operand(u: Tensor, state: Tensor) -> Tensor:
    """Queries, keys or values ``(B, H, T, D)`` as a scan multiplies them.

    On a GPU in half precision as they are; else in the dtype of the state, and so are single tokens, and float16 in
    training, whose gradients would vanish.
    """
    half = u.dtype == torch.bfloat16 or (u.dtype == torch.float16 and not torch.is_grad_enabled())
    return u if half and u.shape[2] > 1 and runs_in_triton(state, u) else u.to(state.dtype)


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
