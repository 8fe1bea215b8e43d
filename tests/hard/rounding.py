"""One random memory store in bfloat16 or float16: how far it is from the same store in float64.

The float64 store gets the rounded weights and tokens, so that only what the store computes is compared.
"""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.hard.stores import StoreCase, make_store, store_cases

BOUNDS = {torch.bfloat16: (0.16, 0.016), torch.float16: (0.02, 0.002)}
"""Largest error of outputs and of memory states, as a share of the largest true value."""
WORST: dict[torch.dtype, list[float]] = {dtype: [0.0, 0.0] for dtype in BOUNDS}
"""The largest errors so far."""


@st.composite
def rounding_cases(draw: st.DrawFn) -> tuple[StoreCase, torch.dtype]:
    """Stores whose choice of slots does not depend on rounding, and a dtype."""
    case = draw(store_cases())
    kind, slots, _, _, positions = case.eviction
    eviction = ("FoldAll" if kind == "BiggestKeys" else kind, slots, "recent", 1.0, positions)
    return replace(case, eviction=eviction, padding="none"), draw(st.sampled_from(list(BOUNDS)))


@torch.no_grad()
def check_rounding(drawn: tuple[StoreCase, torch.dtype]) -> None:
    """Raise an AssertionError if outputs or states are off by more than the bounds."""
    case, dtype = drawn
    torch.manual_seed(case.seed)
    low = make_store(case).to(dtype)
    exact = make_store(case)
    exact.load_state_dict(low.state_dict())
    (groups, repeats), (d, e, n) = case.heads, case.sizes
    shapes = [(groups * repeats, d), (groups, d), (groups, e)]
    tokens = [torch.randn(case.rows, h, case.length, size).to(dtype) for h, size in shapes]
    tokens.append(torch.randn(case.rows, case.length, n).to(dtype))
    expected, state = run(exact, [u.double() for u in tokens], [])
    found, end = run(low, tokens, case.cuts)
    assert found.dtype == dtype
    pairs = [(found, expected)]
    if isinstance(state.memory, Tensor):
        assert end.memory.dtype == torch.float32
        pairs.append((end.memory, state.memory))
    for i, (one, other) in enumerate(pairs):
        assert bool(one.isfinite().all())
        error = float((one.double() - other).abs().max() / other.abs().max().clamp(min=1.0))
        WORST[dtype][i] = max(WORST[dtype][i], error)
        assert error <= BOUNDS[dtype][i], f"{dtype}: off by {error:.2g}, expected at most {BOUNDS[dtype][i]}"


def run(store: Any, tokens: list[Tensor], cuts: list[int]) -> Any:
    """Outputs and state of a text in pieces."""
    outs, state, length = [], None, tokens[0].shape[2]
    for a, b in zip([0, *cuts], [*cuts, length], strict=True):
        out, state = store(*(u.narrow(-2, a, b - a) for u in tokens), state)
        outs.append(out)
    return torch.cat(outs, dim=2), state
