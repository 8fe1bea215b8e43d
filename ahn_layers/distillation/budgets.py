"""How many tokens each layer keeps, as arguments of ``retrofit``, and the best choice for a number of bytes."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..evictions import SalientSlots

KEEP, FORGET = 1e-5, 0.05
"""Rates of heads whose tokens stay until better ones come, and of those whose slots are a longer window."""
COVERAGE = 0.9
"""Share of all looking up that the heads do whose tokens stay."""
_UNITS = 4096
"""Parts of the budget that are told apart."""


@dataclass(frozen=True)
class Budgets:
    """What [`calibrate`][ahn_layers.distillation.calibrate] proposes: ``retrofit(model, ..., **budgets.arguments)``.

    Losses are in nats a token, of the texts that were given, with untrained slots (a longer window).

    Attributes:
        capacities: tokens that each layer keeps in each key/value head; None for full attention.
        window_size: the window of every layer, if the rest is in slots.
        num_sinks: sinks of every layer.
        slots: the policy that keeps what is beyond ``window_size``; None for windows alone.
        rates: for each layer and key/value head, how fast the priority of kept tokens ages (``SalientSlots.rate``).
        retrieval: attention that each key/value head pays from answers to their facts, shape (layers, heads); one row
            for each of ``capacities``.
        costs: what windowing a layer alone costs, by layer and capacity: divergence from full attention.
        bytes: of the caches of all layers in ``capacities``, for one text.
        equal_capacity: capacity at which equal layers would take as many bytes.
        full_loss: with full attention.
        equal_loss: with ``equal_capacity`` in every layer, measured.
        expected_loss: what the costs of single layers predict for the proposal.
        loss: of the proposal, measured.
    """

    capacities: dict[int, int | None]
    window_size: int
    num_sinks: int
    slots: SalientSlots | None
    rates: dict[int, list[float]]
    retrieval: Float[Tensor, "layers g"]
    costs: dict[int, dict[int, float]]
    bytes: int
    equal_capacity: int
    full_loss: float
    equal_loss: float
    expected_loss: float
    loss: float

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``retrofit``, beside the compressor."""
        kept = {layer: size for layer, size in self.capacities.items() if size is not None}
        if self.slots is None:
            windows = {layer: size - self.num_sinks for layer, size in kept.items()}
            return {"window_size": windows, "num_sinks": self.num_sinks}
        base = self.window_size + self.num_sinks
        options = self.slots.options()
        policies = {
            layer: type(self.slots)(**options | {"num_slots": size - base, "rate": self.rates[layer]})
            for layer, size in kept.items()
        }
        sizes = {"window_size": self.window_size, "num_sinks": self.num_sinks}
        return {**sizes, "layers": sorted(kept), "eviction": policies}

    def __str__(self) -> str:
        rows = [("layer", "tokens kept", "cost of the smallest", "heads that retrieve")]
        for (layer, size), found in zip(self.capacities.items(), self.retrieval, strict=True):
            least = self.costs[layer][min(self.costs[layer])]
            heads = " ".join(f"{value:.2f}" for value in found.tolist())
            rows.append((str(layer), "all" if size is None else f"{size:,}", f"{least:+.4f}", heads))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
        losses = (
            f"{self.bytes:,} bytes; loss {self.loss:.4f} (expected {self.expected_loss:.4f}), with "
            f"{self.equal_capacity:,} tokens in every layer {self.equal_loss:.4f}, with full "
            f"attention {self.full_loss:.4f}"
        )
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], losses])


def cost_at(costs: Mapping[int, float], capacity: int, length: int) -> float:
    """What windowing a layer costs, between the measured capacities linear in the logarithm of the capacity.

    Args:
        costs: the measured ones, by capacity.
        capacity: at least the smallest one that was measured.
        length: tokens of the texts; a window of that size costs nothing.
    """
    known = dict(costs) | {length: 0.0}
    sizes = sorted(known)
    if capacity >= length:
        return 0.0
    i = max(1, bisect_left(sizes, capacity))
    low, high = sizes[i - 1], sizes[i]
    share = math.log(capacity / low) / math.log(high / low)
    return known[low] + share * (known[high] - known[low])


def spend(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For each layer one of its choices, so that the sum of the costs is smallest within a budget.

    Dynamic programming over a budget of ``_UNITS`` parts, to which sizes are rounded up.

    Args:
        costs: of each choice, by layer.
        sizes: likewise, what it takes of the budget; the smallest ones together fit.
        budget: what there is.
    """
    least = [min(own) for own in sizes]
    unit = max(1.0, (budget - sum(least)) / _UNITS)
    room = int((budget - sum(least)) // unit)
    best = torch.zeros(room + 1, dtype=torch.float64)
    chosen = []
    for own, needs, base in zip(costs, sizes, least, strict=True):
        options = torch.full((len(own), room + 1), torch.inf, dtype=torch.float64)
        for i, (cost, size) in enumerate(zip(own, needs, strict=True)):
            shift = math.ceil((size - base) / unit)
            if shift <= room:
                options[i, shift:] = best[: room + 1 - shift] + cost
        best, which = options.min(dim=0)
        chosen.append(which)
    left, picks = room, []
    for which, needs, base in zip(reversed(chosen), reversed(sizes), reversed(least), strict=True):
        pick = int(which[left])
        left -= math.ceil((needs[pick] - base) / unit)
        picks.append(pick)
    return picks[::-1]


def check_coverage(coverage: float) -> None:
    """Raise a ValueError for what is no share of all that is looked up."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage={coverage}: expected a share of what is looked up, above 0 and at most 1.")


def covering(found: Float[Tensor, " n"], coverage: float) -> Bool[Tensor, " n"]:
    """The fewest entries whose sum is at least a share of the sum of all; one at least.

    Args:
        found: what each entry looks up, not negative.
        coverage: the share, above 0 and at most 1.
    """
    order = found.double().sort(descending=True)
    before = order.values.cumsum(0) - order.values  # of all that are larger
    chosen = torch.zeros_like(found, dtype=torch.bool)
    chosen[order.indices] = before < coverage * order.values.sum()
    chosen[order.indices[0]] = True
    return chosen


def rates_of(
    retrieval: Float[Tensor, "layers g"], coverage: float, keep: float = KEEP, forget: float = FORGET
) -> list[list[float]]:
    """For each head a rate: the fewest that together look up the given share keep their tokens, the others forget."""
    chosen = covering(retrieval.flatten(), coverage).view_as(retrieval)
    return torch.where(chosen, keep, forget).tolist()  # type: ignore[no-any-return]
