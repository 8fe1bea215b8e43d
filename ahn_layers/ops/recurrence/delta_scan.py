"""The gated delta rule over many tokens, in chunks: the recurrence of DeltaNet and GatedDeltaNet.

Dimensions as in ``linear_scan``.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..decode.fold import fold_and_read
from .affine_scan import states_between
from .chunks import cut, decay_matrix, per_state
from .forms import runs_in_triton, scan_in_triton


def gated_delta_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    beta: Float[Tensor, "b s t"],
    g: Float[Tensor, "b s t"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S <- exp(g_t) S; S <- S + k_t (beta_t (v_t - S^T k_t))^T; r_t = S^T q_t`` (arXiv 2406.06484, 2412.06464).

    Inside a chunk the written values solve ``(I + A) u = beta (v - since k S)`` with the strictly lower triangular
    ``A_ij = beta_i exp(g_{j+1} + ... + g_i) k_i . k_j`` (the WY form); only the state ``S`` passes from chunk to chunk.

    Args:
        state: the state before the first token; its dtype is the dtype of the computation.
        q: queries, one per folded token; queries of one group share a state.
        k: folded keys, normalised by the caller; states of one group share them.
        v: folded values, likewise.
        beta: write strength in [0, 1]; 0 with ``g = 0`` folds nothing.
        g: log decay per token, None for no decay.
        chunk_size: tokens folded at once; by default 32, on a GPU 128.

    Returns:
        What each query reads, in the dtype of the state (of ``k`` in kernels), and the state after the last token.
    """
    length = q.shape[2]
    if length == 1:
        q, k, v, beta = (u.squeeze(2).to(state.dtype) for u in (q, *per_state(state, k, v), beta))
        r, state = fold_and_read(state, q, k, v, None if g is None else g.squeeze(2).to(state.dtype), beta)
        return r.unsqueeze(2), state
    if chunk_size is None and runs_in_triton(state, k):
        return scan_in_triton(state, q, k, v, g, beta)
    return _chunks(state, q, k, v, g, beta, chunk_size)


def _chunks(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The scan in plain PyTorch, exact in values and gradients."""
    length = q.shape[2]
    chunk_size = chunk_size or (128 if state.is_cuda else 32)
    q, k, v, g = cut(state, q, k, v, g, chunk_size)
    beta = F.pad(beta.to(state.dtype), (0, -length % chunk_size))
    beta = beta.unflatten(2, (-1, chunk_size)).unsqueeze(-1)
    total, decay = decay_matrix(g)
    since = total.exp().unsqueeze(-1)
    system = (beta * (k @ k.mT) * decay).tril(-1)
    identity = torch.eye(chunk_size, dtype=state.dtype, device=state.device).expand_as(system)
    solve = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True) * beta.mT
    u, w = solve @ v, (solve * since.mT) @ k
    repeats = q.shape[3] // chunk_size
    scores = (q @ k.mT) * decay.repeat(1, 1, 1, repeats, 1)
    reach = q * since.repeat(1, 1, 1, repeats, 1)
    tail = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT
    carry = total[..., -1:].exp().expand(*k.shape[:3], 1)
    before, state = states_between(state, carry, tail, u, w)
    r = reach @ before + scores @ (u - w @ before)
    return rearrange(r, "b s n (r c) e -> b (s r) (n c) e", c=chunk_size)[:, :, :length], state
