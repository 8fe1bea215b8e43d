"""Which form of an operation on slots runs where: the one place of this folder that chooses."""

import torch
from torch import Tensor

from ..triton_forms import in_triton


def chooses_in_triton(priority: Tensor) -> bool:
    """Whether a kernel finds when each token is lost."""
    return in_triton(priority) and priority.dtype != torch.float64
