"""Gated linear attention over many tokens: the recurrence of Mamba2 and of plain linear attention, in chunks.

Dimensions: b batch, h query heads, s states (h is a multiple of s, s one of g and u), t tokens, d key size, e value
size; inside a chunk n chunks, c tokens a chunk, r = h / s queries that share a state.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..decode.fold import fold_and_read
from .chunks import cut, decay_matrix, per_state
from .forms import runs_in_triton, scan_in_triton


def gated_linear_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    g: Float[Tensor, "b s t"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, read after folding: ``r_t = S_t^T q_t`` (arXiv 2405.21060, section 6).

    Args:
        state: the state before the first token; its dtype is the dtype of the computation.
        q: queries, one per folded token; queries of one group share a state.
        k: folded keys; states of one group share them.
        v: folded values, likewise.
        g: log decay per token, None for no decay.
        chunk_size: tokens folded at once, by default 64.

    Returns:
        What each query reads, in the dtype of the state (of ``k`` in kernels), and the state after the last token.
    """
    length = q.shape[2]
    if length == 1:
        q, k, v = (u.squeeze(2).to(state.dtype) for u in (q, *per_state(state, k, v)))
        r, state = fold_and_read(state, q, k, v, None if g is None else g.squeeze(2).to(state.dtype))
        return r.unsqueeze(2), state
    if chunk_size is None and runs_in_triton(state, k):
        return scan_in_triton(state, q, k, v, g, None)
    return _chunks(state, q, k, v, g, None, chunk_size)


def _chunks(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: None, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The scan in plain PyTorch, exact in values and gradients."""
    length = q.shape[2]
    chunk_size = chunk_size or 64
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
    return r[:, :, :length], states[:, :, -1].clone()  # else it would hold the states of all chunks
