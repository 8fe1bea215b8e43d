"""What heads and layers keep, by how much they look up: the rates of their priorities, and their slots."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..evictions.scores import LearnedScore
from .budgets import COVERAGE, FORGET, KEEP, check_coverage, covering, rates_of
from .retention import salient_slots

LAYER_COVERAGE = 0.5
"""Share of all looking up that the layers do which get the slots of the others."""


@torch.no_grad()
def set_rates(
    model: nn.Module,
    retrieval: Float[Tensor, "layers g"],
    *,
    coverage: float = COVERAGE,
    keep: float = KEEP,
    forget: float = FORGET,
) -> None:
    """Choose the rates at which priorities age, by what the heads do.

    Args:
        model: a retrofitted model with learned scores in every layer.
        retrieval: what ``retrieval_heads`` returned, or its mean over several batches.
        coverage: the fewest heads that together do this share of all looking up let their tokens stay until better
            ones come.
        keep: rate of these heads, in units of the score for each token of the text.
        forget: rate of the others.

    Raises:
        ValueError: if there are other numbers of layers or heads in the model, or a rate or the coverage is out of
            range.
    """
    check_coverage(coverage)
    for name, rate in (("keep", keep), ("forget", forget)):
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name}={rate}: expected a rate above 0, whose logarithm is trained.")
    scores = _scores_of(model, retrieval)
    for score, rates in zip(scores, rates_of(retrieval, coverage, keep, forget), strict=True):
        score.log_rate.copy_(torch.tensor(rates).log())


@torch.no_grad()
def settle_rates(model: nn.Module, *, keep: float = KEEP, below: float = 1e-3) -> None:
    """Give the heads whose tokens stay one small rate again, after training has changed it.

    Training on texts of a few thousand tokens can hardly tell such rates apart: 1e-4 makes a difference of 0.4 to the
    score there, and of 3.3 in a text of 32,768 tokens, which is forgotten then.

    Args:
        model: a retrofitted model with learned scores.
        keep: the new rate of these heads, in units of the score for each token of the text.
        below: the rates that are replaced.

    Raises:
        ValueError: if a rate is not above 0, or ``keep`` is not below ``below``.
    """
    if not 0 < keep < below < float("inf"):
        raise ValueError(f"keep={keep}, below={below}: expected rates above 0, keep the smaller one.")
    for policy in salient_slots(model):
        assert policy.learned is not None
        rate = policy.learned.rate
        policy.learned.log_rate.copy_(torch.where(rate < below, keep, rate).log())


def set_slots(
    model: nn.Module,
    retrieval: Float[Tensor, "layers g"],
    *,
    coverage: float = LAYER_COVERAGE,
    least: int = 0,
) -> list[int]:
    """Give the layers that look things up the slots of the others, at equal bytes.

    What was learned does not depend on the number of slots, so this can be done before training or after it. Caches
    that were filled before do not fit any more.

    Args:
        model: a retrofitted model with learned scores in every layer.
        retrieval: what ``retrieval_heads`` returned, or its mean over several batches.
        coverage: the fewest layers that together do this share of all looking up get equally many slots.
        least: slots of the other layers. By default none: they fold every token at once.

    Returns:
        The slots of each layer. Where layers differ in their key/value heads or the size of these, the bytes of all
        slots together stay the same, not their number.

    Raises:
        ValueError: if there are other numbers of layers or heads in the model, the coverage is out of range, or there
            are fewer than ``least`` slots in a layer on average.
    """
    check_coverage(coverage)
    scores, policies = _scores_of(model, retrieval), salient_slots(model)
    widths = [len(score.log_rate) * score.up_v.in_features for score in scores]
    room = sum(policy.num_slots * width for policy, width in zip(policies, widths, strict=True))
    chosen, mean = covering(retrieval.sum(dim=1), coverage).tolist(), room // sum(widths)
    if not isinstance(least, int) or not 0 <= least <= mean:
        raise ValueError(f"least={least!r}: expected a whole number from 0 to {mean}, the mean of all layers.")
    room -= sum(least * width for width, own in zip(widths, chosen, strict=True) if not own)
    most = room // sum(width for width, own in zip(widths, chosen, strict=True) if own)
    for policy, own in zip(policies, chosen, strict=True):
        policy.num_slots = most if own else least
    return [policy.num_slots for policy in policies]


def _scores_of(model: nn.Module, retrieval: Tensor) -> list[LearnedScore]:
    """The learned scores, layer by layer.

    Raises:
        ValueError: if ``retrieval`` is of another model.
    """
    scores = [policy.learned for policy in salient_slots(model) if policy.learned is not None]
    sizes = [len(score.log_rate) for score in scores]
    if retrieval.shape[0] != len(sizes) or any(size != retrieval.shape[1] for size in sizes):
        raise ValueError(
            f"retrieval has shape {tuple(retrieval.shape)}: expected {len(sizes)} layers of {sizes} heads."
        )
    if not bool(((retrieval >= 0) & retrieval.isfinite()).all()):
        raise ValueError(
            f"retrieval holds values from {float(retrieval.min())} to {float(retrieval.max())}: expected what heads "
            "look up, finite and not negative. Pass what retrieval_heads returned; if that is not a number, run the "
            "model in bfloat16 or float32."
        )
    return scores
