"""Attention over several sets of keys, from the attention over each: joined by their log-sum-exps."""

import torch
from jaxtyping import Float
from torch import Tensor

from . import forms


def join(
    outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], backwards: int | None = None
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h t"]]:
    """Attention over several sets of keys, from the attention over each.

    Args:
        outs: attention over each set, ``(b, t, h, d)``.
        lses: its log-sum-exp, ``(b, h, t)``.
        backwards: the one whose tokens come in reverse order, None for none.
    """
    if len(outs) == 1:
        return outs[0], lses[0]
    if forms.joins_in_triton(*outs):
        from . import triton_join

        return triton_join.join(outs, lses, backwards)
    if backwards is not None:
        outs = tuple(u.flip(1) if i == backwards else u for i, u in enumerate(outs))
        lses = tuple(u.flip(2) if i == backwards else u for i, u in enumerate(lses))
    lse = torch.stack(lses).logsumexp(dim=0)
    total = torch.zeros_like(outs[0], dtype=lse.dtype)
    for out, part in zip(outs, lses, strict=True):
        total.addcmul_(out.to(lse.dtype), (part - lse).exp().transpose(1, 2).unsqueeze(-1))
    return total.to(outs[0].dtype), lse
