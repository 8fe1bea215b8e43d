"""The small pieces that compressors are made of."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def outer(k: Float[Tensor, "*h d"], v: Float[Tensor, "*h e"]) -> Float[Tensor, "*h d e"]:
    """The outer product ``k v^T`` of every head."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def l2_normalize(u: Float[Tensor, "*h d"], eps: float = 1e-6) -> Float[Tensor, "*h d"]:
    """``u / sqrt(sum(u^2) + eps)`` over the last dimension."""
    return u * torch.rsqrt(u.square().sum(dim=-1, keepdim=True) + eps)


def rms_normalize(u: Float[Tensor, "*h d"], eps: float = 1e-5) -> Float[Tensor, "*h d"]:
    """``u / sqrt(mean(u^2) + eps)`` over the last dimension."""
    return u * torch.rsqrt(u.square().mean(dim=-1, keepdim=True) + eps)


def project(linear: nn.Linear, x: Float[Tensor, "b t n"]) -> Float[Tensor, "b h t"]:
    """One scalar per head from hidden states: in the dtype of the weights, returned in float32 at least."""
    y = linear(x.to(linear.weight.dtype))
    return y.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)


class HeadwiseLinear(nn.Module):
    """One square matrix per head, without bias, zero at initialisation: an untrained memory adds nothing.

    Args:
        num_heads: heads, H.
        size: channels per head, E; the weight is ``(H, E, E)``.
    """

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, size, size))

    def forward(self, u: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h t e"]:
        """``out_h = u_h W_h``, in the dtype of the weight."""
        return torch.einsum("bhtd,hde->bhte", u.to(self.weight.dtype), self.weight)


class Scale(nn.Module):
    """A learned factor per channel, one at initialisation.

    Args:
        size: channels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, u: Float[Tensor, "*h e"]) -> Float[Tensor, "*h e"]:
        """``u * weight``, in the dtype of ``u``."""
        return u * self.weight.to(u.dtype)
