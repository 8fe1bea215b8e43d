"""Removes tokens from a state, as if they had never arrived."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from .state import MemoryState


def without(state: MemoryState, ranks: Bool[Tensor, "b c"]) -> MemoryState:
    """The state as if some tokens had never arrived: later ones move up. The columns seen stay what they are.

    Args:
        state: the state; it stays as it is.
        ranks: True for the tokens to leave out, by rank; tokens of further ranks stay.

    Raises:
        ValueError: if a token has left the window of a row that is to lose one.
    """
    late = ranks.any(dim=1) & (state.seen > state.window.capacity)
    if bool(late.any()):
        raise ValueError(
            f"rows {late.nonzero().flatten().tolist()} have folded tokens into their memory: what arrived cannot "
            "be taken back. Keep a clone of the state from before."
        )
    held = len(state.slots)
    slot = torch.arange(held, device=state.seen.device)
    gone = torch.zeros(state.batch_size, held, dtype=torch.bool, device=state.seen.device)
    size = min(held, ranks.shape[1])
    gone[:, :size] = ranks[:, :size]  # while nothing has left, a token sits in the slot of its rank
    seen = state.seen - (gone & (slot < state.seen.unsqueeze(1))).sum(dim=1)
    slots = state.slots.take(gone.to(torch.uint8).argsort(dim=1, stable=True))
    empty = (slot >= seen.unsqueeze(1)).unsqueeze(1)
    slots = slots.map(lambda u: u.masked_fill(empty.view(*empty.shape, *[1] * (u.ndim - 3)), 0))
    return replace(state, slots=slots, seen=seen, padded=True)
