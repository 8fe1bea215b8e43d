"""The normalisations around a scan, computed in float32 at least; in half precision on a GPU in one kernel each."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from . import forms


def l2_normalize(u: Float[Tensor, "*h d"], eps: float = 1e-6, scale: float = 1.0) -> Float[Tensor, "*h d"]:
    """``scale * u / sqrt(sum(u^2) + eps)`` over the last dimension, in the dtype of ``u``."""
    if forms.normalizes_in_triton(u):
        from . import triton_normalize

        return triton_normalize.l2_normalize(u, scale, eps)
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)
    return (wide * (factor if scale == 1.0 else scale * factor)).to(u.dtype)


def rms_normalize(u: Float[Tensor, "*h d"], eps: float = 1e-5) -> Float[Tensor, "*h d"]:
    """``u / sqrt(mean(u^2) + eps)`` over the last dimension, in the dtype of ``u``."""
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(u.dtype)


def gated_rms_norm(
    r: Float[Tensor, "b h t e"], weight: Float[Tensor, " e"], gate: Float[Tensor, "b h t"], eps: float = 1e-5
) -> Float[Tensor, "b h t e"]:
    """``rms_normalize(r) * weight * silu(gate)``, in the dtype of ``r``."""
    if forms.normalizes_in_triton(r):
        from . import triton_normalize

        return triton_normalize.gated_rms_norm(r, weight, gate.float(), eps)
    wide = r.to(torch.promote_types(r.dtype, torch.float32))
    return (rms_normalize(wide, eps) * weight.to(wide.dtype) * F.silu(gate).unsqueeze(-1)).to(r.dtype)
