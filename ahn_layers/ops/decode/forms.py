"""Which form of a decode step runs where: the one place of this folder that chooses."""

import torch
from torch import Tensor

from ..triton_forms import in_triton


def attends_in_triton(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a kernel attends to the slots."""
    return q.dtype != torch.float64 and q.shape[-1] <= 256 and in_triton(q, k, v)


def folds_in_triton(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> bool:
    """Whether a kernel folds and reads; there is none for decays by channel."""
    by_channel = g is not None and g.ndim == 3
    return state.dtype == torch.float32 and not by_channel and in_triton(state, q, k, v, g, beta)


def fits_step(q: Tensor, slots: list[Tensor], memory: object, kept: dict[str, Tensor] | None = None) -> bool:
    """Whether ``decode_step`` runs in kernels for such tensors."""
    sizes = max(q.shape[-1], slots[1].shape[-1]) <= 256 and len(slots) <= 4 and all(u.ndim == 3 for u in slots[2:])
    dtypes = q.dtype != torch.float64 and len({u.dtype for u in (q, *slots)}) == 1
    state = isinstance(memory, Tensor) and memory.dtype == torch.float32 and memory.is_contiguous()
    held = list((kept or {}).values())
    return (
        sizes
        and dtypes
        and (state or (memory is None and bool(held)))
        and all(u.is_contiguous() for u in held)
        and in_triton(q, *slots, *held)
    )
