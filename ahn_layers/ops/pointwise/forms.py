"""Which form of a pointwise operation runs where: the one place of this folder that chooses."""

import torch
from torch import Tensor

from ..triton_forms import has_triton


def normalizes_in_triton(u: Tensor) -> bool:
    """Whether a kernel normalises: in half precision."""
    return u.dtype in (torch.bfloat16, torch.float16) and u.dim() == 4 and has_triton(u)


def turns_in_triton(q: Tensor) -> bool:
    """Whether a kernel turns queries back: those of more than one token; a compiler makes its own."""
    return q.shape[2] > 1 and q.dtype != torch.float64 and has_triton(q) and not torch.compiler.is_compiling()


def compares_in_triton(logits: Tensor) -> bool:
    """Whether a kernel computes the distillation loss."""
    return has_triton(logits) and logits.dtype in (torch.float32, torch.bfloat16)
