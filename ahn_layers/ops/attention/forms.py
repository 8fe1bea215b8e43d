"""Which form of attention runs where: the one place of this folder that chooses."""

import torch
from torch import Tensor

from ..triton_forms import in_triton
from .between import Between


def is_fused(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's fused kernels can take these queries and values."""
    size = q.shape[-1]
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and size == v.shape[-1] <= 256 and size % 8 == 0


def is_fused_beside(part: Between) -> bool:
    """Whether there is a kernel for these keys: not in training."""
    return part.soft is None and not torch.is_grad_enabled() and in_triton(part.k, part.v)


def is_cut_in_pieces(q: Tensor, context_k: Tensor, window_size: int) -> bool:
    """Whether the window is cut into pieces with causal masks only: where it is always full, or holds all the keys.

    cuDNN's kernels know no windows and are the fastest on Hopper, FlashAttention 2 skips what its window hides.
    """
    length, columns = q.shape[2], context_k.shape[2]
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # the device's properties are asked for
        and length >= 512
        and (columns <= window_size or columns == length + window_size - 1 >= 3 * length - 1)
        and has_cudnn(q)
    )


def has_cudnn(q: Tensor) -> bool:
    """Whether cuDNN's kernels serve these queries, and are the fastest for them."""
    return (
        q.shape[-1] in (64, 128)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(q.device) == (9, 0)
    )


def joins_in_triton(*outs: Tensor) -> bool:
    """Whether a kernel joins attention over several sets of keys."""
    return in_triton(*outs) and outs[0].dtype != torch.float64 and not torch.compiler.is_compiling()
