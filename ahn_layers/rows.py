"""Rows of states: joined into one state, and put in the place of others."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from .compressor import map_state
from .state import MemoryState


def join_rows(states: Sequence[MemoryState]) -> MemoryState:
    """One state with the rows of all, in that order; they may have seen different numbers of tokens.

    Args:
        states: of stores of one window, with one compressor and eviction.

    Returns:
        A state that shares nothing with them, detached from any graph.

    Raises:
        ValueError: if there is no state, or they do not fit together.
    """
    if not states:
        raise ValueError("no states to join: expected at least one.")
    first = states[0]
    for other in states[1:]:
        check_alike(first, other)
    columns = max(len(state.slots) for state in states)
    slots, *others = (state.slots.widened(columns) for state in states)
    memory = None
    if first.memory is not None:
        memory = map_state(_cat, *(state.memory for state in states))  # type: ignore[arg-type]
    lengths = [state.length for state in states]
    known = [length for length in lengths if length is not None]
    return replace(
        first,
        slots=slots.zip(_cat, *others),
        seen=_cat(*(state.seen for state in states)),
        memory=memory,
        length=max(known) if len(known) == len(lengths) else None,
        padded=len(set(lengths)) > 1 or any(state.padded for state in states),
        inplace=False,
        kept={name: _cat(*(state.kept[name] for state in states)) for name in first.kept},
    )


@torch.no_grad()
def put_rows(state: MemoryState, rows: Int[Tensor, " r"], other: MemoryState) -> None:
    """Replace rows of a state by those of another one. Tensors stay where they are, unless the others hold more tokens.

    Args:
        state: is changed.
        rows: the numbers of its rows that are replaced.
        other: has as many rows.

    Raises:
        ValueError: if the states do not fit together. Nothing has changed.
    """
    check_alike(state, other)
    columns = max(len(state.slots), len(other.slots))
    state.slots, slots = state.slots.widened(columns), other.slots.widened(columns)
    mine = state.tensors()
    for name, u in replace(other, slots=slots).tensors().items():
        mine[name].index_copy_(0, rows.to(u.device), u)
    state.padded |= other.padded or state.length != other.length
    state.length = None if state.length is None or other.length is None else max(state.length, other.length)


def check_alike(one: MemoryState, other: MemoryState) -> None:
    """Raise a ValueError unless the rows of two states may stand in one state."""
    if one.window != other.window:
        raise ValueError(f"rows of {one.window} and of {other.window}: expected one window for all rows of a state.")
    tensors, others = one.tensors(), other.tensors()
    if tensors.keys() != others.keys():
        raise ValueError(
            f"rows that hold {sorted(tensors)} and rows that hold {sorted(others)}: they were made by different "
            "compressors or evictions. Expected the same for all rows of a state."
        )
    for name, u in tensors.items():
        v, columns = others[name], 2 if name in ("k", "v") or name.startswith("gates.") else None
        mine, its = ((w.dtype, w.device, _sizes(w, columns)) for w in (u, v))
        if mine != its:
            raise ValueError(
                f"rows whose {name} is {u.dtype} on {u.device} of shape {tuple(u.shape)}, and rows whose {name} is "
                f"{v.dtype} on {v.device} of shape {tuple(v.shape)}: expected the same dtype, device and sizes for all "
                "rows of a state; the numbers of rows and of tokens alone may differ."
            )


def _sizes(u: Tensor, columns: int | None) -> tuple[int, ...]:
    """The shape but for the rows and, if there is one, the dimension of columns."""
    return tuple(size for i, size in enumerate(u.shape) if i not in (0, columns))


def _cat(*parts: Tensor) -> Tensor:
    return torch.cat([u.detach() for u in parts])
