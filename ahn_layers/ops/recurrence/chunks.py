"""What the chunked scans share: cutting tokens into chunks, and the decay between two tokens of a chunk."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def cut(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    g: Float[Tensor, "b s t"] | None,
    size: int,
) -> tuple[
    Float[Tensor, "b s n rc d"], Float[Tensor, "b s n c d"], Float[Tensor, "b s n c e"], Float[Tensor, "bg sg ng c"]
]:
    """Cut the time axis into chunks, in the dtype of the state; the last chunk is filled up with idle tokens.

    Returns:
        Queries of a group side by side within a chunk, keys, values, and log decays; without ``g`` these are zeros of
        shape ``(1, 1, 1, size)``.
    """
    fill = -k.shape[2] % size
    q, k, v = (F.pad(u.to(state.dtype), (0, 0, 0, fill)) for u in (q, *per_state(state, k, v)))
    q = rearrange(q, "b (s r) (n c) d -> b s n (r c) d", s=state.shape[1], c=size)
    k, v = (u.unflatten(2, (-1, size)) for u in (k, v))
    if g is None:
        return q, k, v, state.new_zeros(1, 1, 1, size)
    return q, k, v, F.pad(g.to(state.dtype), (0, fill)).unflatten(2, (-1, size))


def per_state(state: Float[Tensor, "b s d e"], *tensors: Float[Tensor, "b _ t _"]) -> list[Float[Tensor, "b s t _"]]:
    """Keys or values once for every state; there are several states to a head if they differ in their gates."""
    repeats = [state.shape[1] // u.shape[1] for u in tensors]
    return [u if n == 1 else u.repeat_interleave(n, dim=1) for u, n in zip(tensors, repeats, strict=True)]


def decay_matrix(g: Float[Tensor, "*b c"]) -> tuple[Float[Tensor, "*b c"], Float[Tensor, "*b c c"]]:
    """Log decay since the start of the chunk, and the decay from token ``j`` to token ``i >= j`` (0 for ``i < j``)."""
    total = g.cumsum(dim=-1)
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, float("-inf"))
    return total, between.exp()


def in_chunks(u: Float[Tensor, "b s t *d"], size: int) -> Float[Tensor, "b s n {size} *d"]:
    """The time axis cut into chunks, the last one filled up with zeros."""
    return F.pad(u, (*[0, 0] * (u.ndim - 3), 0, -u.shape[2] % size)).unflatten(2, (-1, size))
