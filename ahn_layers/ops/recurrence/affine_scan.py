"""The states between the chunks of a delta-rule scan: a recurrence of affine maps, one after the other or in groups."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def states_between(
    state: Float[Tensor, "b s d e"],
    carry: Float[Tensor, "b s n _"],
    tail: Float[Tensor, "b s n d c"],
    u: Float[Tensor, "b s n c e"],
    w: Float[Tensor, "b s n c d"] | None,
) -> tuple[Float[Tensor, "b s n d e"], Float[Tensor, "b s d e"]]:
    """``S_n = carry_n S_{n-1} + tail_n (u_n - w_n S_{n-1})``: the state before each chunk, and after the last.

    Args:
        state: the state before the first chunk.
        carry: decay over each chunk, one for all channels or one for each.
        tail: keys of each chunk, decayed to its end, transposed.
        u: what the chunk would write into an empty state.
        w: what the state takes off that; None for nothing.
    """
    if state.is_cuda:  # few large products: launches cost more than arithmetic
        identity = torch.eye(tail.shape[3], dtype=state.dtype, device=state.device)
        linear = carry.unsqueeze(-1) * identity
        return compose(state, linear if w is None else linear - tail @ w, tail @ u)
    before = []
    for n in range(u.shape[2]):
        before.append(state)
        written = u[:, :, n] if w is None else u[:, :, n] - w[:, :, n] @ state
        state = carry[:, :, n].unsqueeze(-1) * state + tail[:, :, n] @ written
    return torch.stack(before, dim=2), state


def compose(
    state: Float[Tensor, "b s d e"], a: Float[Tensor, "b s n d d"], c: Float[Tensor, "b s n d e"]
) -> tuple[Float[Tensor, "b s n d e"], Float[Tensor, "b s d e"]]:
    """``S_n = A_n S_{n-1} + C_n`` in groups of about ``sqrt(n)`` steps.

    First the compositions within all groups side by side, then from group to group: ``2 sqrt(n)`` products in a row
    instead of ``n``.
    """
    steps = a.shape[2]
    size = max(1, math.isqrt(steps))
    fill = -steps % size
    if fill:  # steps that do nothing
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(*a.shape[:2], fill, -1, -1)
        a, c = torch.cat((a, identity), dim=2), F.pad(c, (0, 0, 0, 0, 0, fill))
    a, c = a.unflatten(2, (-1, size)), c.unflatten(2, (-1, size))
    linear, constant = a[:, :, :, 0], c[:, :, :, 0]
    inside = [(linear, constant)]  # from the start of each group to after its first, second, ... step
    for i in range(1, size):
        linear, constant = a[:, :, :, i] @ linear, a[:, :, :, i] @ constant + c[:, :, :, i]
        inside.append((linear, constant))
    starts = []
    for group in range(a.shape[2]):
        starts.append(state)
        state = linear[:, :, group] @ state + constant[:, :, group]
    start = torch.stack(starts, dim=2)
    before = [start, *(m @ start + n for m, n in inside[:-1])]
    return torch.stack(before, dim=3).flatten(2, 3)[:, :, :steps], state
