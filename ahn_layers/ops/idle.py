"""Zero gradients for parameters that a call did not use."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def with_idle(out: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The tensor as it is, bit for bit; its backward pass gives each parameter that is trained a gradient of zeros.

    So a batch in which no token leaves the window can be trained on, alone or in one process of several, each of
    which waits for a gradient of every trained parameter.
    """
    if not torch.is_grad_enabled():
        return out
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _Idle.apply(out, *trained) if trained else out


class _Idle(torch.autograd.Function):
    """``out``, and zeros for the rest."""

    @staticmethod
    def forward(out: Tensor, *parameters: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
