"""Whether the parts of a memory state fit together: a file may hold anything."""

from typing import Any

import torch
from torch import Tensor

from .tokens import Tokens
from .window import Window

_LONGEST = 1 << 53
"""Columns of the longest text that a state may speak of."""


def check_parts(
    window: Window, slots: Tokens, seen: Tensor, length: Any, padded: Any, others: dict[str, Tensor]
) -> None:
    """Raise a ValueError unless these can be the parts of one state."""
    rows, groups, held = slots.k.shape[:3] if slots.k.ndim == 4 else (0, 0, 0)
    if slots.k.ndim != 4 or slots.v.ndim != 4 or slots.v.shape[:3] != slots.k.shape[:3]:
        _refuse("k and v", (slots.k.shape, slots.v.shape), "two tensors (rows, heads, slots, size)")
    if not (slots.k.is_floating_point() and slots.k.dtype == slots.v.dtype) or rows < 1 or groups < 1:
        _refuse("k and v", (slots.k.dtype, slots.v.dtype, slots.k.shape), "one floating dtype, and at least one row")
    for name, gate in slots.gates.items():
        if gate.ndim not in (3, 4) or gate.shape[0] != rows or gate.shape[2] != held:
            _refuse(f"the gate {name}", gate.shape, f"({rows}, heads, {held}), or that and a size")
    if seen.dtype != torch.long or seen.shape != (rows,) or bool((seen < 0).any()):
        _refuse("seen", (seen.dtype, seen.tolist()), f"{rows} whole numbers of at least 0")
    for name, u in others.items():
        if u.ndim < 1 or u.shape[0] != rows:
            _refuse(name, u.shape, f"{rows} rows")
    if type(padded) is not bool:
        _refuse("padded", padded, "true or false")
    most = int(seen.max())
    if length is not None:
        if type(length) is not int or not most <= length < _LONGEST:
            _refuse("length", length, f"a whole number, at least the {most} tokens seen")
        if not padded and bool((seen != length).any()):
            _refuse("length", length, f"the tokens seen, {seen.tolist()}, since there is no padding")
    needed = min(window.capacity, most)
    if not needed <= held <= window.capacity:
        _refuse("slots", held, f"{needed} to {window.capacity}")


def check_same(window: Window, mine: dict[str, Tensor], theirs: Window, others: dict[str, Tensor]) -> None:
    """Raise a ValueError unless the tensors of one state take those of another without a change of shape or dtype."""
    held, given = ({name: f"{u.dtype} {tuple(u.shape)}" for name, u in named.items()} for named in (mine, others))
    if window != theirs:
        raise ValueError(f"the values of a state of {theirs} in one of {window}: expected one window.")
    for name in sorted(held.keys() | given.keys()):
        if held.get(name) != given.get(name):
            raise ValueError(
                f"a state whose {name} is {given.get(name)} does not fit into one whose {name} is {held.get(name)}: "
                "expected the same in both. The rows of a state at fixed addresses, of a static cache, keep their "
                "number: make a dynamic one with cache.clone()."
            )


def _refuse(what: str, found: Any, expected: str) -> None:
    if isinstance(found, torch.Size):
        found = tuple(found)
    raise ValueError(f"a damaged state: {what} {found!r}, expected {expected}.")
