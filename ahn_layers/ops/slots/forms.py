"""Which form of an operation on slots runs where: the one place of this folder that chooses."""

import torch
from torch import Tensor

from ..triton_forms import in_triton


def chooses_in_triton(priority: Tensor) -> bool:
    """Whether a kernel finds when each token is lost."""
    return in_triton(priority) and priority.dtype != torch.float64


def scores_in_triton(x: Tensor, v: Tensor, down: Tensor) -> bool:
    """Whether a kernel computes a learned score: of a single token in each row."""
    return x.shape[1] == 1 and x.dtype != torch.float64 and in_triton(x, v, down)
