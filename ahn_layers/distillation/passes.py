"""Teacher and student passes of one batch: the same model with full attention, and with its memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention import HippocampalAttention
from ..retrofit import adapter_parameters, full_attention, memory_attention, window_only
from .hidden_states import output_head, run_hidden
from .loss import check_ids, check_slice, sliced_loss
from .noise import evaluating, still


class DistillationLoss(NamedTuple):
    """What [`distillation_loss`][ahn_layers.distillation.distillation_loss] found.

    Attributes:
        loss: the weighted sum, with gradient.
        divergence: KL(teacher || student) in nats a token.
        cross_entropy: the student's loss on the next tokens, in nats; 0 if it was not asked for.
        layers: mean relative squared error of the attention outputs; 0 if it was not asked for.
        tokens: how many tokens they were averaged over.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    layers: Tensor
    tokens: int


def freeze_base(model: nn.Module) -> list[nn.Parameter]:
    """Let the memory train and nothing else; the memory's parameters become float32, for the optimiser's sake.

    Args:
        model: a retrofitted model.

    Returns:
        The memory's parameters.

    Raises:
        ValueError: if the model has no memory to train.
    """
    model.requires_grad_(False)
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no memory to train: call retrofit(model, GatedDeltaNet, ...) first."
        )
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def distillation_loss(
    model: nn.Module,
    input_ids: Int[Tensor, "b t"],
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    layer_weight: float = 0.0,
    answers: Bool[Tensor, "b t"] | None = None,
    answer_weight: float = 1.0,
    answer_ce_weight: float = 0.0,
    slice_size: int = 1024,
) -> DistillationLoss:
    """Compare the model with its memory to the same model with full attention (arXiv 2510.07318, section 3.3).

    Averaged over the positions beyond the capacity of the window, the smallest one if they differ: there the memory
    makes a difference. The teacher runs without gradient.

    Args:
        model: a retrofitted transformers model, bare or wrapped (DistributedDataParallel, FSDP2).
        input_ids: token ids without padding, longer than the capacity.
        kl_weight: factor of KL(teacher || student).
        ce_weight: factor of the student's cross-entropy on the text itself.
        layer_weight: factor of the squared error of each layer's attention output, relative to the teacher's.
        answers: True at tokens that decide whether the memory recalls, answers about facts far back for instance. Their
            own mean divergence is added, since among all other tokens they would hardly count.
        answer_weight: factor of that.
        answer_ce_weight: factor of their own mean cross-entropy: what full attention answers wrongly is not learned.
        slice_size: tokens whose logits exist at a time.

    Returns:
        The loss with gradient, and its parts without.

    Raises:
        ValueError: if the model is not retrofitted, the text is not longer, or ``answers`` is not a boolean mask of the
            tokens.
    """
    start = least_capacity(model)
    check_ids(input_ids)
    if input_ids.shape[1] <= start:
        raise ValueError(
            f"sequences of {input_ids.shape[1]} tokens and a window that holds {start}: expected longer ones, there is "
            "nothing to learn inside the window."
        )
    if answers is not None and (answers.shape != input_ids.shape or answers.dtype != torch.bool):
        raise ValueError(
            f"answers has shape {tuple(answers.shape)}, {answers.dtype}: expected a boolean mask of the shape of "
            f"input_ids, {tuple(input_ids.shape)}."
        )
    head = output_head(model)
    recomputed = still(model)
    with torch.no_grad(), full_attention(model), evaluating(recomputed):
        teacher, goals = run_hidden(model, input_ids, with_layers=layer_weight != 0)
    with memory_attention(model):
        student, outputs = run_hidden(model, input_ids, with_layers=layer_weight != 0)
    last = -1 if ce_weight else None  # the last token has no successor to predict
    labels = input_ids[:, start + 1 :].flatten() if ce_weight else None
    loss, divergence, cross_entropy = sliced_loss(
        student[:, start:last].flatten(0, 1),
        head,
        teacher=teacher[:, start:last].flatten(0, 1) if kl_weight else None,
        labels=labels,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        slice_size=slice_size,
    )
    if answers is not None and (answer_weight or answer_ce_weight):
        chosen = answers[:, start + 1 :]  # the position before a token predicts it
        if bool(chosen.any()):
            own, goal = (u[:, start:-1][chosen] for u in (student, teacher))
            of_answers, *_ = sliced_loss(
                own,
                head,
                teacher=goal,
                labels=input_ids[:, start + 1 :][chosen],
                kl_weight=answer_weight,
                ce_weight=answer_ce_weight,
                slice_size=slice_size,
            )
            loss = loss + of_answers
    layers = loss.new_zeros(())
    if layer_weight:
        errors = [relative_error(u[:, start:], goal[:, start:]) for u, goal in zip(outputs, goals, strict=True)]
        layers = torch.stack(errors).mean()
        loss = loss + layer_weight * layers
    return DistillationLoss(loss, divergence, cross_entropy, layers.detach(), student[:, start:last].shape[:2].numel())


@torch.no_grad()
def arm_losses(
    model: nn.Module,
    input_ids: Int[Tensor, "b t"],
    *,
    start: int | None = None,
    slice_size: int = 1024,
    arms: Sequence[str] = ("full", "window", "memory"),
) -> dict[str, Float[Tensor, "b u"]]:
    """Loss on every next token beyond the capacity: with full attention, with the window alone, with the memory.

    Args:
        model: a retrofitted transformers model.
        input_ids: token ids without padding.
        start: first position that predicts, the capacity by default.
        slice_size: tokens whose logits exist at a time.
        arms: which of the three.

    Returns:
        ``full``, ``window`` and ``memory``, in nats, for the tokens ``start + 1`` to the last.

    Raises:
        KeyError: if there is no such arm.
        ValueError: if the model is not retrofitted, or the text does not reach to ``start``.
    """
    start = least_capacity(model) if start is None else start
    check_ids(input_ids)
    check_slice(slice_size)
    if not 0 <= start < input_ids.shape[1]:
        raise ValueError(
            f"sequences of {input_ids.shape[1]} tokens, start={start}: expected longer ones, start has to be a token."
        )
    recomputed = still(model)
    head, labels = output_head(model), input_ids[:, start + 1 :].flatten()
    modes: dict[str, Callable[[], Any]] = {
        "full": lambda: full_attention(model),
        "window": lambda: window_only(model),
        "memory": lambda: memory_attention(model),
    }
    losses = {}
    for arm in arms:
        with modes[arm](), evaluating(recomputed):
            hidden = run_hidden(model, input_ids)[0][:, start:-1].flatten(0, 1)
        pieces = [
            nn.functional.cross_entropy(head(h).float(), y, reduction="none")
            for h, y in zip(hidden.split(slice_size), labels.split(slice_size), strict=True)
        ]
        losses[arm] = torch.cat(pieces).view(len(input_ids), -1)
    return losses


def gap_closed(full: float, window: float, memory: float) -> float:
    """Which share of what the window loses against full attention the memory wins back: 1 is all, NaN if no gap.

    Args:
        full: mean loss of full attention, as ``arm_losses`` finds it, in nats a token.
        window: that of the window alone.
        memory: that of the memory.
    """
    return (window - memory) / (window - full) if window != full else float("nan")


def relative_error(u: Float[Tensor, "b t n"], goal: Float[Tensor, "b t n"]) -> Float[Tensor, ""]:
    """Squared error over the square of the goal, both averaged, in float32 at least."""
    precise = torch.promote_types(u.dtype, torch.float32)
    goal = goal.to(precise)
    return (u.to(precise) - goal).square().mean() / goal.square().mean().clamp(min=1e-12)


def least_capacity(model: nn.Module) -> int:
    """The smallest capacity of the model's windows: beyond it, memory and full attention differ.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    found = [m.memory.window.capacity for m in model.modules() if isinstance(m, HippocampalAttention)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no HippocampalAttention: call retrofit(model, ...) first.")
    return min(found)
