"""Soft visibility of evicted tokens: what makes the choice of the kept ones differentiable in training.

Dimensions: b batch, g key/value heads, c candidates, t queries.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_STRIDE = 64
"""Queries that share a threshold, at most."""
_NEVER = -1e4
"""A threshold that every token passes."""


def soft_visibility(
    priority: Float[Tensor, "b g c"],
    first: Int[Tensor, "b g c"],
    queries: Int[Tensor, " t"],
    num_slots: int,
    temperature: float,
) -> Float[Tensor, "b g t c"]:
    """The logarithm of how visible each evicted token is: ``log sigmoid((priority - threshold) / temperature)``.

    The threshold lies between the best ``num_slots`` tokens and the others. Its gradient is the one that keeps the sum
    of the visibilities: who raises one token lowers the others, as slots are limited. (With a threshold that has no
    gradient, all scores and rates grow together and training fails.)

    Args:
        priority: of each candidate.
        first: the first query that each candidate has left the window for.
        queries: their numbers, in order.
        num_slots: slots of each key/value head.
        temperature: in units of the priority.

    Returns:
        What is added to the logits; minus infinity where a token has not left yet.
    """
    stride = max(1, min(_STRIDE, num_slots // 4))  # few tokens leave meanwhile, compared with the slots
    value, starts = priority.detach(), queries[::stride]
    left = first.unsqueeze(2) <= starts.unsqueeze(1)
    best = value.unsqueeze(2).masked_fill(~left, float("-inf"))
    best = best.topk(min(num_slots + 1, best.shape[3]), dim=3).values
    if best.shape[3] <= num_slots or num_slots == 0:
        threshold = torch.full_like(best[..., 0], _NEVER if num_slots else -_NEVER)
    else:
        threshold = (best[..., num_slots - 1] + best[..., num_slots]) / 2
        threshold = torch.where(threshold.isfinite(), threshold, _NEVER)
    threshold = threshold.repeat_interleave(stride, dim=2)[:, :, : len(queries)].unsqueeze(3)
    left = first.unsqueeze(2) <= queries.unsqueeze(1)
    seen = torch.sigmoid((value.unsqueeze(2) - threshold) / temperature)
    share = (seen * (1 - seen)).masked_fill(~left, 0)
    share = share / share.sum(dim=3, keepdim=True).clamp(min=1e-6)
    shift = (share @ (priority - value).unsqueeze(3)).squeeze(3)  # zero, with the threshold's gradient
    return F.logsigmoid((priority.unsqueeze(2) - threshold - shift.unsqueeze(3)) / temperature).masked_fill(
        ~left, float("-inf")
    )
