"""Recurrences whose decay differs between the channels of a key, over many tokens, in chunks.

``channel_scan`` is the recurrence of GLA and, with ``beta``, of KDA; ``rank_one_scan`` is the one of RWKV-7 and of
every other transition that is a diagonal and a matrix of rank one. Dimensions as in ``gated_scan``.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..decode.fold import fold_and_read
from .affine_scan import states_between
from .channel_chunks import Decays
from .chunks import in_chunks, per_state
from .forms import runs_in_fla


def channel_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    g: Float[Tensor, "b s t d"],
    beta: Float[Tensor, "b s t"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S <- diag(exp(g_t)) S``, then ``S + k_t v_t^T`` or, with ``beta``, the delta rule; ``r_t = S^T q_t``.

    arXiv 2312.06635; with ``beta``, ``S <- S + k_t (beta_t (v_t - S^T k_t))^T``, arXiv 2510.26692.

    Arguments and results as of ``gated_delta_scan``, with a log decay for each channel of the key. Chunks have a power
    of two of tokens, by default 32; given their size, the plain form runs everywhere.
    """
    if chunk_size is None and runs_in_fla(state, k):
        from . import flash_linear

        return flash_linear.channel_scan(state, q, k, v, g, beta)
    length, size = q.shape[2], chunk_size or 32
    if length == 1:
        q, k, v, g = (u.squeeze(2).to(state.dtype) for u in (q, *per_state(state, k, v), g))
        r, state = fold_and_read(state, q, k, v, g, None if beta is None else beta.squeeze(2).to(state.dtype))
        return r.unsqueeze(2), state
    q, k, v, decays = _cut(state, q, k, v, g, size)
    u, w = v, None
    if beta is not None:
        beta = in_chunks(beta.to(state.dtype), size).unsqueeze(-1)
        solve = _unit_inverse(beta * decays.stored(k, k)) * beta.mT
        u, w = solve @ v, solve @ (k * decays.since.exp())
    return _run(state, q, [k], u, w, decays, [decays.read(q, k)], length)


def rank_one_step(
    state: Float[Tensor, "b s d e"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    g: Float[Tensor, "b s d"],
    a: Float[Tensor, "b s d"],
    b: Float[Tensor, "b s d"],
) -> Float[Tensor, "b s d e"]:
    """``diag(exp(g)) S + b (S^T a)^T + k v^T`` for one token."""
    found = a.unsqueeze(-2) @ state
    return state * g.exp().unsqueeze(-1) + b.unsqueeze(-1) * found + k.unsqueeze(-1) * v.unsqueeze(-2)


def rank_one_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    g: Float[Tensor, "b s t d"],
    a: Float[Tensor, "b s t d"],
    b: Float[Tensor, "b s t d"],
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S <- diag(exp(g_t)) S + b_t (S^T a_t)^T + k_t v_t^T``, read after it: ``r_t = S^T q_t`` (arXiv 2503.14456).

    Under ``a`` the state is read as it was before the token, under ``b`` what was read is added: ``b = -beta a`` takes
    it off. Other arguments as of ``channel_scan``.
    """
    if chunk_size is None and runs_in_fla(state, k):
        from . import flash_linear

        return flash_linear.rank_one_scan(state, q, k, v, g, a, b)
    length, size = q.shape[2], chunk_size or 32
    if length == 1:
        q, k, v, g, a, b = (u.squeeze(2).to(state.dtype) for u in (q, *per_state(state, k, v), g, a, b))
        state = rank_one_step(state, k, v, g, a, b)
        return (q.unflatten(1, (state.shape[1], -1)) @ state).flatten(1, 2).unsqueeze(2), state
    q, k, v, decays = _cut(state, q, k, v, g, size)
    a, b = (in_chunks(u.to(state.dtype), size) for u in (a, b))
    solve = _unit_inverse(-decays.stored_before(a, b))
    found, w = solve @ (decays.stored_before(a, k) @ v), -solve @ (a * decays.before.exp())
    scores = [decays.read(q, u) for u in (k, b)]
    u, w = torch.cat((v, found), dim=3), torch.cat((torch.zeros_like(w), w), dim=3)
    return _run(state, q, [k, b], u, w, decays, scores, length)


def _cut(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, size: int
) -> tuple[Float[Tensor, "r b s n c d"], Float[Tensor, "b s n c d"], Float[Tensor, "b s n c e"], Decays]:
    """In chunks and in the dtype of the state; queries that share a state one after the other."""
    q, k, v, g = (in_chunks(u.to(state.dtype), size) for u in (q, *per_state(state, k, v), g))
    return rearrange(q, "b (s r) n c d -> r b s n c d", s=state.shape[1]), k, v, Decays.of(g)


def _unit_inverse(system: Float[Tensor, "*b c c"]) -> Float[Tensor, "*b c c"]:
    """``(I + system)^-1`` of a strictly lower triangular matrix."""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)


def _run(
    state: Tensor, q: Tensor, keys: list[Tensor], u: Tensor, w: Tensor | None, decays: Decays, scores: list[Tensor],
    length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From what each chunk writes (see ``states_between``) to readings and the last state.

    It is written under the first keys, then under the second; the scores are those of the queries with each of them.
    """
    tail = torch.cat([k * decays.until.exp() for k in keys], dim=3).mT
    before, state = states_between(state, decays.since[..., -1, :].exp(), tail, u, w)
    written = u if w is None else u - w @ before
    r = (q * decays.since.exp()) @ before + torch.cat(scores, dim=-1) @ written
    return rearrange(r, "r b s n c e -> b (s r) (n c) e")[:, :, :length], state
