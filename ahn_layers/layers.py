"""Building blocks of compressors."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F


def outer(k: Float[Tensor, "*h d"], v: Float[Tensor, "*h e"]) -> Float[Tensor, "*h d e"]:
    """The outer product ``k v^T`` of every head."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def project(linear: nn.Module, x: Float[Tensor, "b t n"], *, widen: bool = True) -> Float[Tensor, "b h t"]:
    """One scalar per head from hidden states: in the narrower of the two dtypes, returned in float32 at least.

    Args:
        linear: the layer; one that has been quantized or adapted is called as it is.
        x: hidden states.
        widen: False leaves what is returned in the dtype it was computed in.
    """
    if not is_plain(linear):
        y = linear(x)
        return (y.to(torch.promote_types(y.dtype, torch.float32)) if widen else y).transpose(1, 2)
    assert isinstance(linear, nn.Linear)
    x, weight = narrower(x, linear.weight)
    bias: Tensor | None = linear.bias
    idle = -linear.out_features % 8 if x.is_cuda and x.shape[1] > 1 else 0
    if idle:  # matrix units want rows in multiples of 16 bytes: 9 heads without it take five times as long
        weight, bias = F.pad(weight, (0, 0, 0, idle)), None if bias is None else F.pad(bias, (0, idle))
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if idle:
        y = y[..., : linear.out_features]
    if widen and y.dtype not in (torch.float32, torch.float64):
        y = y.float()
    return y.transpose(1, 2)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer computes what its weight and bias say, as plain tensors.

    Adapted and quantized layers do it in their own way: with another ``forward``, or with a weight of another class.
    """
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return False
    return type(linear.weight) in (Tensor, nn.Parameter, FakeTensor)  # the last one stands for a plain one


def narrower(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the smaller one: weights that train in float32 work in the precision of the model."""
    if u.dtype == weight.dtype:
        return u, weight
    dtype = u.dtype if u.dtype.itemsize < weight.dtype.itemsize else weight.dtype
    return u.to(dtype), weight.to(dtype)


class HeadwiseLinear(nn.Module):
    """One square matrix per head, without bias, zero at initialisation: an untrained memory adds nothing.

    Args:
        num_heads: heads, H.
        size: channels per head, E; the weight is ``(H, E, E)``.
    """

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, size, size))

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return "num_heads={}, size={}".format(*self.weight.shape)

    def forward(self, u: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h t e"]:
        """``out_h = u_h W_h``, in the narrower of the dtypes of ``u`` and the weight."""
        u, weight = narrower(u, self.weight)
        return u @ weight


class Scale(nn.Module):
    """A learned factor per channel, one at initialisation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def extra_repr(self) -> str:
        """The size, for ``print(model)``."""
        return f"size={len(self.weight)}"

    def forward(self, u: Float[Tensor, "*h e"]) -> Float[Tensor, "*h e"]:
        """``u * weight``, in the dtype of ``u``."""
        return u * self.weight.to(u.dtype)


class LowRank(nn.Module):
    """Vectors per state, each made of a few numbers: those stay with a token of the window, not the vector.

    A token's numbers are ``x W``, a few for each state; when it is folded they become the vector ``numbers U + bias``.

    Args:
        hidden_size: N.
        rank: numbers per state, R.
        bias: where the bias starts, ``(S, C)``: S vectors of C numbers per token.
    """

    def __init__(self, hidden_size: int, rank: int, bias: Float[Tensor, "s c"]) -> None:
        super().__init__()
        states, size = bias.shape
        self.down = nn.Linear(hidden_size, states * rank, bias=False)
        self.up = nn.Parameter(torch.randn(states, rank, size) * rank**-0.5)
        self.bias = nn.Parameter(bias.unsqueeze(1).clone())  # (S, 1, C), as it is added

    def forward(self, x: Float[Tensor, "b t n"]) -> Float[Tensor, "b s t r"]:
        """The numbers, in float32 at least."""
        return project(self.down, x).unflatten(1, (len(self.up), -1)).transpose(2, 3)

    def expand(self, numbers: Float[Tensor, "b s t r"]) -> Float[Tensor, "b s t c"]:
        """The vectors, in float32 at least."""
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        return numbers @ self.up.to(numbers.dtype) + self.bias.to(numbers.dtype)
