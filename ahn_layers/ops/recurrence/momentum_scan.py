"""The delta rule with momentum over many tokens, in chunks: gradient descent on what is stored, as in Titans.

Dimensions as in ``gated_scan``.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from .affine_scan import compose
from .chunks import cut, decay_matrix, in_chunks, per_state


def momentum_step(
    state: Float[Tensor, "b s d e"],
    momentum: Float[Tensor, "b s d e"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    beta: Float[Tensor, "b s"],
    m: Float[Tensor, "b s"],
    g: Float[Tensor, "b s"] | None,
) -> tuple[Float[Tensor, "b s d e"], Float[Tensor, "b s d e"]]:
    """``Z <- exp(m) Z + k (beta (v - S^T k))^T``, then ``S <- exp(g) S + Z``, for one token; returns ``S, Z``."""
    error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
    momentum = momentum * m.exp()[..., None, None] + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return (state if g is None else state * g.exp()[..., None, None]) + momentum, momentum


def momentum_scan(
    state: Float[Tensor, "b s d e"],
    momentum: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    beta: Float[Tensor, "b s t"],
    m: Float[Tensor, "b s t"],
    g: Float[Tensor, "b s t"] | None = None,
    folds: Bool[Tensor, "b _ t"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"], Float[Tensor, "b s d e"]]:
    """``momentum_step`` for each token in turn, read after it: ``r_t = S^T q_t`` (arXiv 2501.00663).

    Inside a chunk the state before token ``i`` is ``a_i S + b_i Z`` and ``W_ij`` times what token ``j < i`` wrote, with
    scalars that the gates give: what is written solves a triangular system, as for the delta rule. ``S`` and ``Z`` pass
    from chunk to chunk as one matrix of ``2 d`` rows.

    Arguments as of ``gated_delta_scan``, and: ``Z`` before the first token; as ``beta`` the step size; as ``m`` the log
    of what is kept of the momentum; ``folds``, False where the token changes neither ``S`` nor ``Z``.

    Returns:
        What each query reads, and ``S`` and ``Z`` after the last token.
    """
    length, dtype = q.shape[2], state.dtype
    if length == 1:
        return _one(state, momentum, q, k, v, beta, m, g, folds)
    chunk_size = chunk_size or (128 if state.is_cuda else 32)
    moves = torch.ones(1, 1, length, dtype=dtype, device=q.device) if folds is None else folds.to(dtype)
    q, k, v, _ = cut(state, q, k, v, None, chunk_size)
    g = torch.zeros_like(beta) if g is None else g
    g, m, beta = (in_chunks(u.to(dtype) * moves, chunk_size) for u in (g, m, beta))
    moves = in_chunks(moves, chunk_size)
    (kept, fades), (lasting, slows) = decay_matrix(g), decay_matrix(m)
    reach = (fades * moves.unsqueeze(-2)) @ slows  # what a token writes, in the state after each later one
    since = torch.stack((kept.exp(), ((fades * moves.unsqueeze(-2)) @ lasting.exp().unsqueeze(-1)).squeeze(-1)))
    start = torch.stack((torch.ones_like(kept[..., :1]), torch.zeros_like(kept[..., :1])))
    before = torch.cat((start, since[..., :-1]), dim=-1)  # a_i and b_i
    shifted = F.pad(reach, (0, 0, 1, 0))[..., :-1, :]
    system = (shifted * (k @ k.mT) * beta.unsqueeze(-2)).tril(-1)
    identity = torch.eye(chunk_size, dtype=dtype, device=q.device).expand_as(system)
    solve = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    u, w = solve @ v, solve @ torch.cat([part.unsqueeze(-1) * k for part in before], dim=-1)
    ends = torch.stack((reach[..., -1, :], slows[..., -1, :])) * beta  # of what is written, in S and in Z
    tail = torch.cat([(part.unsqueeze(-1) * k).mT for part in ends], dim=-2)
    both, after = _between(torch.cat((state, momentum), dim=2), since[..., -1], lasting[..., -1].exp(), tail, u, w)
    written = beta.unsqueeze(-1) * (u - w @ both)
    repeats = q.shape[3] // chunk_size
    asked = torch.cat([part.repeat(1, 1, 1, repeats).unsqueeze(-1) * q for part in since], dim=-1)
    r = asked @ both + ((q @ k.mT) * reach.repeat(1, 1, 1, repeats, 1)) @ written
    state, momentum = (part.contiguous() for part in after.chunk(2, dim=2))
    return rearrange(r, "b s n (r c) e -> b (s r) (n c) e", c=chunk_size)[:, :, :length], state, momentum


def _one(
    state: Tensor, momentum: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, m: Tensor, g: Tensor | None,
    folds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The scan of a single token."""
    q, k, v, beta, m = (u.squeeze(2).to(state.dtype) for u in (q, *per_state(state, k, v), beta, m))
    after = momentum_step(state, momentum, k, v, beta, m, None if g is None else g.squeeze(2).to(state.dtype))
    if folds is not None:
        where = folds.unsqueeze(-1)
        after = torch.where(where, after[0], state), torch.where(where, after[1], momentum)
    r = (q.unflatten(1, (state.shape[1], -1)) @ after[0]).flatten(1, 2)
    return r.unsqueeze(2), *after


def _between(
    both: Float[Tensor, "b s dd e"],
    carry: Float[Tensor, "2 b s n"],
    slowed: Float[Tensor, "b s n"],
    tail: Float[Tensor, "b s n dd c"],
    u: Float[Tensor, "b s n c e"],
    w: Float[Tensor, "b s n c dd"],
) -> tuple[Float[Tensor, "b s n dd e"], Float[Tensor, "b s dd e"]]:
    """``S`` and ``Z``, one below the other, before each chunk and after the last.

    Args:
        both: before the first chunk.
        carry: the factors of ``S`` and of ``Z`` in ``S`` after a chunk.
        slowed: the factor of ``Z`` in ``Z``.
        tail: keys of each chunk as they are left in both, transposed.
        u: what the chunk would write into an empty state.
        w: what the state takes off that.
    """
    (kept, moved), slowed = carry[..., None, None], slowed[..., None, None]
    if both.is_cuda:  # few large products: launches cost more than arithmetic
        size = both.shape[2] // 2
        one = torch.eye(size, dtype=both.dtype, device=both.device)
        top, bottom = torch.cat((kept * one, moved * one), dim=-1), torch.cat((0 * one * slowed, slowed * one), dim=-1)
        return compose(both, torch.cat((top, bottom), dim=-2) - tail @ w, tail @ u)
    before = []
    for n in range(u.shape[2]):
        before.append(both)
        state, momentum = both.chunk(2, dim=2)
        carried = torch.cat((kept[:, :, n] * state + moved[:, :, n] * momentum, slowed[:, :, n] * momentum), dim=2)
        both = carried + tail[:, :, n] @ (u[:, :, n] - w[:, :, n] @ both)
    return torch.stack(before, dim=2), both
