"""A tensor and a slice of it, whose gradients are summed in one write."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def share_columns(*wanted: tuple[Tensor, int, int]) -> list[tuple[Tensor, Tensor]]:
    """For each ``(u, start, stop)`` the tensor and ``u[:, :, start:stop]``.

    To autograd a slice is a tensor of zeros around its gradient, and a sum with that of the whole: four times the
    traffic of writing the sum in one go.
    """
    tensors = [u for u, _, _ in wanted]
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(u.requires_grad for u in tensors):
        return [(u, u if stop - start == u.shape[2] else u[:, :, start:stop]) for u, start, stop in wanted]
    found = _Share.apply([(start, stop) for _, start, stop in wanted], *tensors)  # type: ignore[no-untyped-call]
    return list(zip(found[: len(wanted)], found[len(wanted) :], strict=True))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bounds: list[tuple[int, int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.bounds = bounds
        ctx.set_materialize_grads(False)
        ctx.sizes = [u.shape[2] for u in tensors]
        parts = [u[:, :, start:stop] for u, (start, stop) in zip(tensors, bounds, strict=True)]
        return *(u.view_as(u) for u in tensors), *parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.bounds)
        halves = zip(grads[:count], grads[count:], ctx.bounds, ctx.sizes, strict=True)
        return None, *(_sum(*half) for half in halves)


def _sum(whole: Tensor | None, part: Tensor | None, bounds: tuple[int, int], size: int) -> Tensor | None:
    """The gradient of the tensor; the given ones may belong to others as well and stay as they are."""
    if part is None:
        return whole
    start, stop = bounds
    if whole is None or torch.is_grad_enabled():  # to be differentiated once more
        padded = F.pad(part, (*[0] * 2 * (part.ndim - 3), start, size - stop))
        return padded if whole is None else whole + padded
    total = torch.empty_like(whole)
    for rest in (slice(0, start), slice(stop, size)):
        if rest.start < rest.stop:
            total[:, :, rest] = whole[:, :, rest]
    torch.add(whole[:, :, start:stop], part, out=total[:, :, start:stop])
    return total
