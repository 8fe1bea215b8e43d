"""One random memory store in bfloat16 or float16: how far it is from the same store in float64.

The float64 store gets the rounded weights and tokens, so that only what the store computes is compared. There are
bounds for window attention, for slots, and for each compressor.
"""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.hard.stores import StoreCase, make_store, store_cases
from tests.methods import COMPRESSORS

PARTS = ("window", "slots", *(u.__name__ for u in COMPRESSORS))
"""What is tried alone: window attention, slots without a compressor, and each compressor behind a window."""
DTYPES = (torch.bfloat16, torch.float16)
BOUNDS = {
    "window": 0.01, "slots": 0.01, "LinearAttention": 0.16, "DeltaNet": 0.08, "GatedDeltaNet": 0.16, "Mamba2": 0.04,
    "RetNet": 0.04, "GLA": 0.04, "KDA": 0.06, "GatedDeltaProduct": 0.2, "RWKV7": 0.08, "Titans": 0.06,
    "AveragePooling": 0.04, "MaxPooling": 0.04,
}  # fmt: skip
"""Largest error of outputs in bfloat16, as a share of the largest true value.

That of a compressor is larger, since its reading is normalised: a small one is made larger with its rounding.
"""
STATE = 0.016
"""The same of memory states, which are sums in float32 of rounded keys and values."""
WORST: dict[tuple[str, torch.dtype], list[float]] = {(part, dtype): [0.0, 0.0] for part in PARTS for dtype in DTYPES}
"""The largest errors so far, by part and dtype."""


def bounds(part: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of outputs and states. float16 has three more bits than bfloat16."""
    share = torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    return BOUNDS[part] * share, STATE * share


@st.composite
def rounding_cases(draw: st.DrawFn) -> tuple[StoreCase, str, torch.dtype]:
    """Stores whose choice of slots does not depend on rounding, the part that is tried, and a dtype."""
    case, part = draw(store_cases()), draw(st.sampled_from(PARTS))
    _, slots, _, _, positions = case.eviction
    eviction = ("SalientSlots" if part == "slots" else "FoldAll", slots, "recent", 1.0, positions)
    compressor = "" if part in ("window", "slots") else part
    case = replace(case, compressor=compressor, eviction=eviction, padding="none")
    return case, part, draw(st.sampled_from(DTYPES))


@torch.no_grad()
def check_rounding(drawn: tuple[StoreCase, str, torch.dtype]) -> None:
    """Raise an AssertionError if outputs or states are off by more than the bounds."""
    case, part, dtype = drawn
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
    pairs = [(0, found, expected)]
    for name, u in state.tensors().items():
        if name.startswith("memory"):
            assert end.tensors()[name].dtype == torch.float32
            pairs.append((1, end.tensors()[name], u))
    for i, one, other in pairs:
        assert bool(one.isfinite().all())
        error = float((one.double() - other).abs().max() / other.abs().max().clamp(min=1.0))
        worst = WORST[part, dtype]
        worst[i] = max(worst[i], error)
        bound = bounds(part, dtype)[i]
        assert error <= bound, f"{part} in {dtype}: off by {error:.2g}, expected at most {bound:.2g}"


def table() -> str:
    """The largest errors so far, by part: outputs and states in bfloat16, in float16."""
    rows = []
    for part in PARTS:
        worst = [share for dtype in DTYPES for share in WORST[part, dtype]]
        rows.append(f"  {part:20}" + "".join(f"{share:>9.2%}" for share in worst))
    return "\n".join(rows)


def run(store: Any, tokens: list[Tensor], cuts: list[int]) -> Any:
    """Outputs and state of a text in pieces."""
    outs, state, length = [], None, tokens[0].shape[2]
    for a, b in zip([0, *cuts], [*cuts, length], strict=True):
        out, state = store(*(u.narrow(-2, a, b - a) for u in tokens), state)
        outs.append(out)
    return torch.cat(outs, dim=2), state
