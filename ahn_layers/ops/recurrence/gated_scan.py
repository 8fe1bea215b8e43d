"""Recurrences whose decay is one number per state, over many tokens: the form that fits, and the one in PyTorch.

Dimensions: b batch, h query heads, s states (h is a multiple of s, s one of g and u), t tokens, d key size, e value
size; inside a chunk n chunks, c tokens a chunk, r = h / s queries that share a state.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..decode.fold import fold_and_read
from .affine_scan import states_between
from .chunks import cut, decay_matrix, in_chunks, per_state
from .forms import runs_in_triton, scan_in_triton


def gated_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    g: Float[Tensor, "b s t"] | None,
    beta: Float[Tensor, "b s t"] | None,
    chunk_size: int | None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``gated_delta_scan`` or, without ``beta``, ``gated_linear_scan``."""
    if q.shape[2] == 1:
        q, k, v = (u.squeeze(2).to(state.dtype) for u in (q, *per_state(state, k, v)))
        gates = (None if u is None else u.squeeze(2).to(state.dtype) for u in (g, beta))
        r, state = fold_and_read(state, q, k, v, *gates)
        return r.unsqueeze(2), state
    if chunk_size is None and runs_in_triton(state, k):
        return scan_in_triton(state, q, k, v, g, beta)
    return _chunks(state, q, k, v, g, beta, chunk_size or (64 if beta is None else 128 if state.is_cuda else 32))


def _chunks(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """The scan in plain PyTorch, exact in values and gradients.

    With ``beta``, the written values of a chunk solve ``(I + A) u = beta (v - since k S)`` with the strictly lower
    triangular ``A_ij = beta_i exp(g_{j+1} + ... + g_i) k_i . k_j`` (the WY form).
    """
    length = q.shape[2]
    q, k, v, g = cut(state, q, k, v, g, size)
    total, decay = decay_matrix(g)
    since, repeats = total.exp().unsqueeze(-1), q.shape[3] // size
    tail = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT
    if beta is None:
        written = v
        before, state = _sums_between(state, total[..., -1].expand(k.shape[:3]), tail @ v)
    else:
        beta = in_chunks(beta.to(state.dtype), size).unsqueeze(-1)
        system = (beta * (k @ k.mT) * decay).tril(-1)
        identity = torch.eye(size, dtype=state.dtype, device=state.device).expand_as(system)
        solve = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True) * beta.mT
        u, w = solve @ v, (solve * since.mT) @ k
        before, state = states_between(state, total[..., -1:].exp().expand(*k.shape[:3], 1), tail, u, w)
        written = u - w @ before
    scores = (q @ k.mT) * decay.repeat(1, 1, 1, repeats, 1)
    r = (q * since.repeat(1, 1, 1, repeats, 1)) @ before + scores @ written
    return rearrange(r, "b s n (r c) e -> b (s r) (n c) e", c=size)[:, :, :length], state


def _sums_between(state: Tensor, total: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk and after the last, from what each chunk adds and its decay.

    They obey the same recurrence, with a chunk in the place of a token.
    """
    _, weights = decay_matrix(F.pad(total, (1, 0)))
    sums = torch.cat((state.unsqueeze(2), updates), dim=2).flatten(3)
    states = (weights @ sums).unflatten(3, state.shape[2:])
    return states[:, :, :-1], states[:, :, -1].clone()  # else it would hold the states of all chunks
