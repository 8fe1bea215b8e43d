"""Reads a mask of transformers: padding, and images whose tokens see each other."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Shown(NamedTuple):
    """What a mask shows of the new tokens.

    Attributes:
        valid: False at padding, None if there is none.
        ahead: the last column of the call that each token's query sees, None if that is always its own.
    """

    valid: Bool[Tensor, "b t"] | None
    ahead: Int[Tensor, "b t"] | None


def shown_by(mask: Tensor, first: int) -> Shown | None:
    """Padding and blocks in a mask that transformers has made for full attention.

    Args:
        mask: ``(b, 1, t, columns)``: True, or zero, where a query sees a key.
        first: the column of the first new token.

    Returns:
        None if the mask says more: if it hides earlier tokens, or shows later ones with gaps between.
    """
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    length = seen.shape[1]
    own = seen[:, :, first : first + length]
    column = torch.arange(length, device=seen.device)
    real = own.diagonal(dim1=1, dim2=2)
    ahead = torch.where(own, column, -1).amax(dim=2)
    ahead = torch.where(real, torch.maximum(ahead, column), column)
    expected = (column <= ahead.unsqueeze(2)) & real.unsqueeze(1)
    if not bool((own == expected)[real].all()):
        return None
    past = seen[:, :, :first]
    if not bool((past == past[:, -1:])[real].all()):
        return None
    nearest = ahead.where(real, torch.zeros_like(ahead)).cummax(dim=1).values
    if not bool((ahead == nearest)[real].all()):
        return None
    ahead = torch.maximum(nearest, column)
    return Shown(None if bool(real.all()) else real, ahead if bool((ahead > column).any()) else None)
