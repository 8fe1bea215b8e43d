"""KL divergence and cross-entropy from hidden states, slice by slice: two full logit tensors never exist."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.pointwise import forms

Head = Callable[[Tensor], Tensor]
"""From hidden states ``(n, N)`` to logits ``(n, V)``; its parameters get no gradient."""


def sliced_loss(
    student: Float[Tensor, "n h"],
    head: Head,
    *,
    teacher: Float[Tensor, "n h"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    slice_size: int = 1024,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """``kl_weight * KL(teacher || student) + ce_weight * cross-entropy``, both averaged over tokens.

    The head is applied to ``slice_size`` hidden states at a time. The gradient of each slice is taken on the spot, so
    that nothing of the size of the vocabulary is kept for the backward pass, and the head runs once.

    Args:
        student: hidden states that the gradient flows to, any floating dtype.
        head: the output layer; logits are compared in float32, or float64 for float64 logits.
        teacher: hidden states of the teacher; needed if ``kl_weight`` is not 0.
        labels: next tokens; needed if ``ce_weight`` is not 0, and used for the third result if given.
        kl_weight: factor of the divergence.
        ce_weight: factor of the cross-entropy.
        slice_size: tokens at a time; the largest tensors are ``(slice_size, V)``.

    Returns:
        The loss, and without gradient its two parts unweighted: divergence and cross-entropy, 0 where not computed.

    Raises:
        ValueError: if there are no tokens, what a weight needs is missing, or teacher or labels are not those of these
            tokens (-100, for tokens to leave out, is none).
    """
    if len(student) == 0:
        raise ValueError("no token to compute a loss on: the sequences do not reach beyond the window's capacity.")
    if kl_weight and teacher is None:
        raise ValueError(f"kl_weight={kl_weight}: expected the teacher's hidden states.")
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight}: expected labels.")
    _check_tokens(student, teacher, labels, slice_size)
    results: tuple[Tensor, Tensor, Tensor] = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, head, kl_weight, ce_weight, slice_size
    )
    return results


def _check_tokens(student: Tensor, teacher: Tensor | None, labels: Tensor | None, slice_size: int) -> None:
    """Raise for what would be compared with other tokens, or with none."""
    check_slice(slice_size)
    for name, u, shape in (("teacher", teacher, student.shape), ("labels", labels, student.shape[:1])):
        if u is not None and u.shape != shape:
            raise ValueError(f"{name} has shape {tuple(u.shape)}: expected {tuple(shape)}, one for each token.")
    if labels is not None and bool((labels < 0).any()):
        raise ValueError(
            f"labels go down to {int(labels.min())}: expected token ids. Leave tokens that do not count (-100) out of "
            "student, teacher and labels, for instance with a boolean mask."
        )


def check_slice(slice_size: int) -> None:
    """Raise a ValueError for what is no number of tokens."""
    if not isinstance(slice_size, int) or slice_size < 1:
        raise ValueError(f"slice_size={slice_size}: expected at least one token at a time.")


def check_ids(input_ids: Tensor) -> None:
    """Raise a ValueError for what are no token ids of texts of one length."""
    if input_ids.ndim != 2 or len(input_ids) == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, {input_ids.dtype}: expected token ids (texts, tokens). "
            "Pass input_ids[None] for a single text."
        )


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        head: Head,
        kl_weight: float,
        ce_weight: float,
        slice_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        gradients, count = [], len(student)
        parts = torch.zeros(2, dtype=torch.promote_types(student.dtype, torch.float32), device=student.device)
        for start in range(0, count, slice_size):
            part = slice(start, start + slice_size)
            hidden = student[part].detach().requires_grad_(wants_gradient)
            goal = None if teacher is None else teacher[part].detach()
            goals = None if labels is None else labels[part]
            with torch.set_grad_enabled(wants_gradient):
                divergence, entropy, gradient = _slice(hidden, goal, goals, head, kl_weight / count, ce_weight / count)
            if gradient is not None:
                gradients.append(gradient)
            parts += torch.stack((divergence, entropy)) / count
        if wants_gradient:
            # nothing is compared where both weights are 0: the error of the layers may be all that counts
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(student))
        ctx.mark_non_differentiable(divergence := parts[0].clone(), entropy := parts[1].clone())
        return kl_weight * divergence + ce_weight * entropy, divergence, entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype), None, None, None, None, None, None)


def _slice(
    hidden: Tensor, teacher: Tensor | None, labels: Tensor | None, head: Head, kl_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divergence and cross-entropy of a slice, summed over its tokens, and the gradient of their weighted sum."""
    logits = head(hidden)
    with torch.no_grad():
        goal = None if teacher is None else head(teacher)
    if forms.compares_in_triton(logits):
        from ..ops.pointwise.triton_loss import compare

        kl_weight, ce_weight = (0.0 if goal is None else kl_weight), (0.0 if labels is None else ce_weight)
        wanted = hidden.requires_grad
        divergence, entropy, slope = compare(logits.detach(), goal, labels, kl_weight, ce_weight, grad=wanted)
        gradient = torch.autograd.grad(logits, hidden, slope)[0] if wanted else None
        return divergence.sum(), entropy.sum(), gradient
    log_student = _log_probabilities(logits)
    divergence = entropy = log_student.new_zeros(())
    if goal is not None:
        divergence = F.kl_div(log_student, _log_probabilities(goal), reduction="sum", log_target=True)
    if labels is not None:
        entropy = F.nll_loss(log_student, labels, reduction="sum")
    loss = kl_weight * divergence + ce_weight * entropy
    gradient = torch.autograd.grad(loss, hidden)[0] if loss.requires_grad else None
    return divergence.detach(), entropy.detach(), gradient


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
