"""A chunked scan on a GPU: forward in Triton, backward through the plain PyTorch form, computed anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_forms import has_triton

Chunks = Callable[..., tuple[Tensor, Tensor]]
"""A scan in plain PyTorch: ``(state, q, k, v, g, beta) -> (readings, state)``."""


def runs_in_triton(state: Tensor, k: Tensor) -> bool:
    """Whether a scan over these tokens has its forward pass in Triton."""
    fits = state.dtype == torch.float32 and max(state.shape[-2:]) <= 128
    return fits and has_triton(k) and not (torch.compiler.is_compiling() and torch.is_grad_enabled())


def scan_in_triton(
    chunks: Chunks, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scan that ``chunks`` computes; for the backward pass only its inputs are kept, not what it makes of them."""
    q, k = (u.to(state.dtype) for u in (q, k))
    g, beta = (None if u is None else u.to(state.dtype) for u in (g, beta))
    if torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in (state, q, k, v, g, beta)):
        result: tuple[Tensor, Tensor] = _Scan.apply(chunks, state, q, k, v, g, beta)
        return result
    return _forward(state, q, k, v, g, beta)


def _forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    from . import triton_scan

    return triton_scan.chunked_scan(*tensors)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: Chunks, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.chunks = chunks
        ctx.save_for_backward(*tensors)
        return _forward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[1:]
        pairs = zip(ctx.saved_tensors, needed, strict=True)
        tensors = [None if u is None else u.detach().requires_grad_(wanted) for u, wanted in pairs]
        with torch.enable_grad():
            outs = ctx.chunks(*tensors)
        leaves = [u for u, wanted in zip(tensors, needed, strict=True) if u is not None and wanted]
        found = iter(torch.autograd.grad(outs, leaves, grads, allow_unused=True))
        return None, *(next(found) if wanted else None for wanted in needed)
