"""One decode step: attention of one query over the slots, and one token folded and read."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .triton_forms import in_triton
from .window_attention import masked_attention


def slot_attention(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b g c d"],
    v: Float[Tensor, "b g c e"],
    seen: Int[Tensor, " b"],
    *,
    full: bool,
    scale: float | None = None,
    softcap: float | None = None,
    q_sinks: Float[Tensor, "b h 1 d"] | None = None,
    num_sinks: int = 0,
) -> Float[Tensor, "b h 1 e"]:
    """Attention of one query per row over the slots that are filled; an empty row sees its first slot.

    Args:
        q: queries.
        k: keys by slot.
        v: values by slot.
        seen: tokens seen in each row; slots are filled in order.
        full: whether every slot of every row is known to be filled.
        scale: logit factor, default ``d ** -0.5``.
        softcap: see ``masked_attention``.
        q_sinks: queries to use against the first ``num_sinks`` slots.
        num_sinks: how many leading slots are sinks.
    """
    if softcap is None and q.dtype != torch.float64 and q.shape[-1] <= 256 and in_triton(q, k, v):
        from . import triton_decode

        turned, facing = (q, 0) if q_sinks is None else (q_sinks, num_sinks)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return triton_decode.slot_attention(q, turned, k, v, seen, facing, scale)
    visible = None
    if not full:
        visible = (torch.arange(k.shape[2], device=q.device) < seen.clamp(min=1).unsqueeze(1))[:, None, None]
    return masked_attention(q, k, v, visible, scale=scale, softcap=softcap, q_sinks=q_sinks, num_sinks=num_sinks)


def delta_step(
    state: Float[Tensor, "b s d e"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    beta: Float[Tensor, "b s"],
) -> Float[Tensor, "b s d e"]:
    """``S + k (beta (v - S^T k))^T`` for one token."""
    stored = (k.unsqueeze(-2) @ state).squeeze(-2)
    return state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * (v - stored)).unsqueeze(-2)


def fold_and_read(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    g: Float[Tensor, "b s"] | None = None,
    beta: Float[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b h e"], Float[Tensor, "b s d e"]]:
    """``S <- exp(g) S``, then ``S + k v^T`` or, with ``beta``, ``S + k (beta (v - S^T k))^T``; read ``S^T q``.

    Args:
        state: the state before; its dtype is that of all tensors.
        q: queries; those of one group share a state.
        k: the folded keys.
        v: the folded values.
        g: log decay, None for no decay.
        beta: write strength of the delta rule, None to add.

    Returns:
        What each query reads, and the state after.
    """
    if state.dtype == torch.float32 and in_triton(state, q, k, v, g, beta):
        from . import triton_decode

        return triton_decode.fold_and_read(state, q, k, v, g, beta)
    if g is not None:
        state = state * g.exp()[..., None, None]
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2) if beta is None else delta_step(state, k, v, beta)
    return (q.unflatten(1, (state.shape[1], -1)) @ state).flatten(1, 2), state
