"""One token folded into a state, and queries that read it."""

import torch
from jaxtyping import Float
from torch import Tensor

from . import forms


def delta_step(
    state: Float[Tensor, "b s d e"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    beta: Float[Tensor, "b s"],
    *,
    fresh: bool = False,
) -> Float[Tensor, "b s d e"]:
    """``S + k (beta (v - S^T k))^T`` for one token; a ``fresh`` state, which nobody else knows, is overwritten."""
    stored = (k.unsqueeze(-2) @ state).squeeze(-2)
    add = Tensor.addcmul_ if fresh and not torch.is_grad_enabled() else torch.addcmul
    return add(state, k.unsqueeze(-1), (beta.unsqueeze(-1) * (v - stored)).unsqueeze(-2))


def fold_and_read(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    g: Float[Tensor, "b s"] | Float[Tensor, "b s d"] | None = None,
    beta: Float[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b h e"], Float[Tensor, "b s d e"]]:
    """``S <- exp(g) S``, then ``S + k v^T`` or, with ``beta``, ``S + k (beta (v - S^T k))^T``; read ``S^T q``.

    Returns:
        What each query reads, and the state after.
    """
    by_channel = g is not None and g.ndim == 3
    if forms.folds_in_triton(state, q, k, v, g, beta):
        from . import triton_decode

        return triton_decode.fold_and_read(state, q, k, v, g, beta)
    if g is not None:
        state = state * (g if by_channel else g.unsqueeze(-1)).exp().unsqueeze(-1)
    if beta is None:
        state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    else:
        state = delta_step(state, k, v, beta, fresh=g is not None)
    grouped = q.reshape(len(q), state.shape[1], -1, q.shape[-1])
    return (grouped @ state).flatten(1, 2), state
