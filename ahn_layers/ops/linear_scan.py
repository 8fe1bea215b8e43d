"""Gated linear attention over many tokens: the recurrence of Mamba2 and of plain linear attention, in chunks.

Dimensions: b batch, h query heads, s states (h is a multiple of s), t tokens, d key size, e value size;
inside a chunk n chunks, c tokens a chunk, r = h / s queries that share a state.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .chunks import cut, decay_matrix


def gated_linear_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b s t d"],
    v: Float[Tensor, "b s t e"],
    g: Float[Tensor, "b s t"] | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, read after folding: ``r_t = S_t^T q_t`` (arXiv 2405.21060, section 6).

    Args:
        state: the state before the first token; its dtype is the dtype of the computation.
        q: queries, one per folded token; queries of one group share a state.
        k: folded keys.
        v: folded values.
        g: log decay per token, None for no decay.
        chunk_size: tokens folded at once.

    Returns:
        What each query reads, and the state after the last token.
    """
    length = q.shape[2]
    q, k, v, g = cut(state, q, k, v, g, chunk_size)
    total, decay = decay_matrix(g)
    scores = rearrange(q @ k.mT, "b s n (r i) j -> b s n r i j", i=chunk_size)
    within = rearrange(scores * decay.unsqueeze(3), "b s n r i j -> b s n (r i) j") @ v
    updates = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT @ v
    # the states between the chunks obey the same recurrence, with a chunk in the place of a token
    between = F.pad(total[..., -1].expand(k.shape[:3]), (1, 0))
    _, weights = decay_matrix(between)
    sums = torch.cat((state.unsqueeze(2), updates), dim=2).flatten(3)
    states = (weights @ sums).unflatten(3, state.shape[2:])
    reach = total.exp().repeat(1, 1, 1, q.shape[3] // chunk_size).unsqueeze(-1)
    r = within + (q * reach) @ states[:, :, :-1]
    r = rearrange(r, "b s n (r c) e -> b (s r) (n c) e", c=chunk_size)
    return r[:, :, :length], states[:, :, -1]
