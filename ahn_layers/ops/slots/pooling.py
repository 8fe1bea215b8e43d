"""Tokens pooled into slots: every ``rate`` of them become one slot, and the oldest slot makes room (arXiv 1911.05507).

Dimensions: b batch, h query heads, s states, t tokens, n slots, d key size, e value size; m blocks of ``rate`` tokens.
The state of a pool, by name:

- ``keys (b, s, n, d)`` and ``values (b, s, n, e)``: the slots, the newest last, and ``filled (b, s)``, how many are;
- ``open_keys (b, s, d)`` and ``open_values (b, s, e)``: the sum or the maximum of the tokens of the slot that is being
  filled, and ``opened (b, s)``, how many they are.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Pool = Literal["mean", "max"]
_PIECE = 1024
"""Tokens pooled at once: bounds the logits of their queries with each other's blocks."""


def pool_step(
    state: dict[str, Tensor], k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"], rate: int, pool: Pool
) -> dict[str, Tensor]:
    """One token taken in."""
    opened = state["opened"] + 1
    closes = opened == rate
    after = {"opened": torch.where(closes, 0, opened)}
    after["filled"] = (state["filled"] + closes).clamp(max=state["keys"].shape[2])
    for name, u in (("keys", k), ("values", v)):
        held, slots, full = state[f"open_{name}"], state[name], closes[..., None]
        first = (state["opened"] == 0)[..., None]
        total = held + u if pool == "mean" else torch.where(first, u, torch.maximum(held, u))
        pushed = torch.cat((slots[:, :, 1:], _pooled(total, rate, pool).unsqueeze(2)), dim=2)
        after[name] = torch.where(full[..., None], pushed, slots)
        after[f"open_{name}"] = torch.where(full, 0, total)
    return after


def pool_read(state: dict[str, Tensor], q: Float[Tensor, "b h d"], scale: float, pool: Pool) -> Float[Tensor, "b h e"]:
    """Softmax attention over the slots and the one that is being filled; zeros from an empty pool."""
    opened, count = state["opened"], state["keys"].shape[2]
    running = [_pooled(state[f"open_{name}"], opened.clamp(min=1)[..., None], pool) for name in ("keys", "values")]
    keys, values = (torch.cat((state[n], u.unsqueeze(2)), 2) for n, u in zip(("keys", "values"), running, strict=True))
    filled = torch.arange(count, device=q.device) >= count - state["filled"][..., None]
    visible = torch.cat((filled, (opened > 0)[..., None]), dim=2).unsqueeze(2)
    logits = scale * q.unflatten(1, (keys.shape[1], -1)) @ keys.mT
    weights = logits.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(dim=-1)
    return (weights @ values).flatten(1, 2)


def pool_scan(
    state: dict[str, Tensor],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b s t d"],
    v: Float[Tensor, "b s t e"],
    folds: Bool[Tensor, "b s t"],
    *,
    rate: int,
    pool: Pool,
    scale: float,
) -> tuple[Float[Tensor, "b h t e"], dict[str, Tensor]]:
    """``pool_step`` and ``pool_read`` for each token in turn."""
    readings = []
    for start in range(0, q.shape[2], _PIECE):
        part = slice(start, start + _PIECE)
        tokens = (q[:, :, part], k[:, :, part], v[:, :, part], folds[:, :, part])
        r, state = _piece(state, tokens, rate, pool, scale)
        readings.append(r)
    return torch.cat(readings, dim=2), state


def _piece(
    state: dict[str, Tensor], tokens: tuple[Tensor, Tensor, Tensor, Tensor], rate: int, pool: Pool, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """All tokens at once: laid out in blocks of ``rate``, with the pool of the first ones of a block beside each."""
    q, k, v, folds = tokens
    held, blocks = state["opened"].long().unsqueeze(-1), q.shape[2] // rate + 2
    taken = held + folds.long().cumsum(dim=2)  # tokens in blocks once each query reads, those before included
    place = torch.where(folds, taken - 1, blocks * rate)  # the last column is for what is not taken in
    closed, count = taken // rate, state["keys"].shape[2]
    age = torch.arange(-count, blocks, device=q.device)  # of a slot: blocks before the first new one
    there = torch.cat((age[:count] >= -state["filled"][..., None], (age[count:] >= 0).expand(*held.shape[:2], -1)), 2)
    visible = there.unsqueeze(2) & (age < closed[..., None]) & (age >= closed[..., None] - count)
    running, every = {}, {}
    for name, u in (("keys", k), ("values", v)):
        total = _running(u, place, state[f"open_{name}"], held, blocks, rate, pool)
        pooled = _pooled(total, torch.arange(1, rate + 1, device=q.device).unsqueeze(-1), pool)
        running[name] = _at(pooled.flatten(2, 3), (taken - 1).clamp(min=0))
        every[name] = torch.cat((state[name], pooled[:, :, :, -1]), dim=2)
        state = state | {f"open_{name}": _at(total.flatten(2, 3), (taken[..., -1:] - 1).clamp(min=0)).squeeze(2)}
    asked = scale * q.unflatten(1, (k.shape[1], -1))
    logits = torch.cat(
        (asked @ every["keys"].unsqueeze(2).mT, (asked * running["keys"].unsqueeze(2)).sum(-1, keepdim=True)), dim=-1
    )
    visible = torch.cat((visible, (taken % rate > 0)[..., None]), dim=-1).unsqueeze(2)
    weights = logits.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(dim=-1)
    r = weights[..., :-1] @ every["values"].unsqueeze(2) + weights[..., -1:] * running["values"].unsqueeze(2)
    last, opened = closed[..., -1:], taken[..., -1] % rate
    newest = last + torch.arange(count, device=q.device)
    after = {name: _at(every[name], newest) for name in ("keys", "values")}
    after |= {f"open_{n}": torch.where((opened > 0)[..., None], state[f"open_{n}"], 0) for n in ("keys", "values")}
    filled = (state["filled"] + last.squeeze(-1)).clamp(max=count)
    return r.flatten(1, 2), {**after, "filled": filled.to(q.dtype), "opened": opened.to(q.dtype)}


def _running(
    u: Float[Tensor, "b s t d"],
    place: Int[Tensor, "b s t"],
    held: Float[Tensor, "b s d"],
    opened: Int[Tensor, "b s 1"],
    blocks: int,
    rate: int,
    pool: Pool,
) -> Float[Tensor, "b s m {rate} d"]:
    """The sum or maximum of each block's tokens up to each of its places, those held before among them."""
    nothing = 0.0 if pool == "mean" else torch.finfo(u.dtype).min
    laid = u.new_full((*u.shape[:2], blocks * rate + 1, u.shape[3]), nothing)
    laid = laid.scatter(2, place.unsqueeze(-1).expand_as(u), u)[:, :, :-1].unflatten(2, (blocks, rate))
    held = torch.where(opened > 0, held, nothing)
    early = torch.cat(
        (held[:, :, None, None], laid.new_full((*held.shape[:2], blocks - 1, 1, held.shape[2]), nothing)), 2
    )
    if pool == "mean":
        return laid.cumsum(dim=3) + early
    total = torch.maximum(laid.cummax(dim=3).values, early)
    return total.masked_fill(total == nothing, 0)  # of places that no token has reached


def _pooled(total: Tensor, count: Tensor | int, pool: Pool) -> Tensor:
    """The pool of ``count`` tokens, of their sum or maximum."""
    return total / count if pool == "mean" else total


def _at(u: Float[Tensor, "b s _ d"], index: Int[Tensor, "b s t"]) -> Float[Tensor, "b s t d"]:
    return u.gather(2, index.unsqueeze(-1).expand(*index.shape, u.shape[3]))
