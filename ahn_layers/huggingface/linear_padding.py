"""Padding is nothing to a convolution or a recurrence either.

A layer of transformers reads padding as zeros, and where a call brings one token, as a token. Before the first real
token zeros are nothing; later they shift a convolution and fade a recurrence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .cache_layers import MemoryLayer
from .linear_rows import STATES, recurring


@dataclass(frozen=True, eq=False)
class Resting:
    """Rows to which a call brings nothing but padding, and what their convolutions and recurrences hold.

    Attributes:
        rows: their numbers.
        states: what each of these rows holds, by layer, kind and number of the state; absent before the first token.
    """

    rows: Int[Tensor, " r"]
    states: dict[tuple[int, str, int], Tensor]

    @torch.no_grad()
    def put_back(self, cache: Any) -> None:
        """After the call: these rows are what they were."""
        for key, states in _states(cache):
            rows = self.rows.to(states.device)
            before = self.states.get(key, torch.zeros_like(states[:1]).expand(len(rows), *states.shape[1:]))
            states.index_copy_(0, rows, before)


def resting_rows(cache: Any, real: Bool[Tensor, "b t"] | None) -> Resting | None:
    """The rows that a call must leave as they are, None if there are none or nothing but attention could change them.

    Args:
        cache: the cache of the call.
        real: False at padding among the new tokens, None if there is none.

    Raises:
        ValueError: if new tokens of a row that goes on are padding in part.
    """
    layers = getattr(cache, "layers", ())
    if real is None or not recurring(layers):
        return None
    real = real.cpu()
    first = next((u.state for u in layers if isinstance(u, MemoryLayer) and u.state is not None), None)
    goes_on = torch.zeros(len(real), dtype=torch.bool) if first is None else first.seen.cpu() > 0
    if len(goes_on) != len(real):
        return None  # the store names both numbers
    partly = goes_on & real.any(dim=1) & ~real.all(dim=1)
    if bool(partly.any()):
        raise ValueError(
            f"attention_mask marks some of the {real.shape[1]} new tokens of rows "
            f"{partly.nonzero().flatten().tolist()} as padding: this model has convolutions or recurrences, which "
            "would take it in. Expected new tokens that "
            "are all real or all padding in each row that goes on. Take such rows out with cache.take(row), let each "
            "go on alone, and put it back with cache.put(row, other)."
        )
    rows = (~real.any(dim=1)).nonzero().flatten()
    if len(rows) == 0:
        return None
    if any(getattr(layer, "linear", layer).record_past for layer in recurring(layers)):
        raise ValueError(
            f"attention_mask marks all new tokens of rows {rows.tolist()} as padding, and the cache records its past "
            "(activate_past_recording): a convolution cannot take back what it has not read. Expected a real token in "
            "each row; take such rows out with cache.take(row)."
        )
    return Resting(rows, {key: u.index_select(0, rows.to(u.device)).detach() for key, u in _states(cache)})


def _states(cache: Any) -> Iterable[tuple[tuple[int, str, int], Tensor]]:
    """Every state of a cache that has begun, by its place."""
    for i, layer in enumerate(recurring(cache.layers)):
        for name in STATES:
            for k, states in getattr(layer, name).items():
                if states is not None:
                    yield (i, name, k), states
