"""How much of the gap between window and full attention a memory closes, where there is a gap at all.

Paired differences of losses, token by token, and the standard error of their mean say whether there is one.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from arms import arms_of, equal_window, stores_of, use_arm
from torch import Tensor

from ahn_layers.distillation import arm_losses, gap_closed

ARMS = ("full", "window", "memory")
SEGMENT = 128
"""Tokens of a text that count as one measurement, where there are few texts."""
FEW = 5
"""With fewer texts than this, segments are counted instead."""
# fmt: off
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
"""Two-sided 95 % quantiles of Student's t for 1, 2, ..., 30 degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        mean: in nats per token.
        error: standard error of the mean, infinite for a single measurement.
        count: number of measurements.
    """

    mean: float
    error: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where zero lies outside the 95 % interval, else 0: the difference is not significant."""
        quantile = STUDENT[min(self.count - 1, len(STUDENT)) - 1] if self.count > 1 else math.inf
        return 0 if not abs(self.mean) > quantile * self.error else round(math.copysign(1, self.mean))

    @property
    def verdict(self) -> str:
        """In words, for the gap between window and full attention."""
        return {1: "significant", 0: "not significant", -1: "full attention is worse"}[self.sign]


def difference(texts: list[Tensor]) -> Difference:
    """Mean of paired differences, and its standard error over texts, or over segments of them where texts are few.

    Args:
        texts: for each text the difference of each of its tokens, shape (T,).
    """
    few = len(texts) < FEW
    parts = [part for text in texts for part in text.tensor_split(max(1, len(text) // SEGMENT) if few else 1)]
    means = torch.stack([part.double().mean() for part in parts])
    error = float(means.std()) / math.sqrt(len(parts)) if len(parts) > 1 else math.inf
    return Difference(float(means.mean()), error, len(parts))


def stretch_losses(
    model: Any,
    pieces: list[Tensor],
    i: int,
    start: int,
    window: tuple[int, int] | None = None,
    arms: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Loss of each token of one stretch from ``start`` on, in every arm and with the memory of another text.

    Args:
        model: a retrofitted model.
        pieces: the stretches, each of shape (1, T).
        i: which one.
        start: first position that predicts.
        window: ``(window_size, num_sinks)`` of the memory, its own by default.
        arms: which ones, those of the model by default.
    """
    losses = {arm: _losses(model, arm, pieces[i], start, window) for arm in arms or arms_of(model)}
    if len(pieces) > 1:
        with swapped_memories(model):
            pair = torch.cat((pieces[i], pieces[i - len(pieces) // 2]))
            losses["another_text"] = _losses(model, "memory", pair, start, window)
    return losses


def span_losses(
    model: Any,
    text: Tensor,
    length: int,
    rng: random.Random,
    window: tuple[int, int],
    begin: Sequence[int] = (),
    arms: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Loss of each token but the first of a span that comes again after every arm's window has lost it, in every arm.

    Args:
        model: a retrofitted model.
        text: token ids, shape (T,).
        length: tokens of the stretch that ends with the span; it begins anywhere in the text.
        rng: source of randomness.
        window: ``(window_size, num_sinks)`` of the memory.
        begin: the tokens that the stretch begins with.
        arms: as for ``stretch_losses``.
    """
    start, kept = rng.randrange(len(text) - length + 1), length - SEGMENT
    place = start + rng.randint(window[1], kept - SEGMENT - sum(equal_window(model, window)))
    first = torch.tensor(list(begin), dtype=text.dtype, device=text.device)
    ids = torch.cat((first, text[start + len(begin) : start + kept], text[place : place + SEGMENT])).long()[None]
    return {arm: _losses(model, arm, ids, kept, window) for arm in arms or arms_of(model)}


def measure_spans(losses: list[dict[str, Tensor]]) -> dict[str, Any]:
    """For each arm its mean loss, by how much it is below that of the window, and the standard error of that.

    Args:
        losses: of each span, by arm, one value for each token.
    """
    results: dict[str, Any] = {}
    for arm in losses[0]:
        by_span = [float(span[arm].mean()) for span in losses]
        gains = torch.tensor([float(span["window"].mean()) for span in losses]) - torch.tensor(by_span)
        error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else None
        results[arm] = {"loss": sum(by_span) / len(by_span), "gain": float(gains.mean()), "gain_error": error}
        results[arm]["by_span"] = by_span
    return results


def _losses(model: Any, arm: str, ids: Tensor, start: int, window: tuple[int, int] | None) -> Tensor:
    """Losses of the first row."""
    mode = arm if arm in ("full", "window") else "memory"
    with use_arm(model, arm, window):
        return arm_losses(model, ids, start=start, arms=[mode])[mode][0].double().cpu()


def measure(losses: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Mean losses, and the share of the gap that is closed: None where full attention is not better for sure.

    Args:
        losses: of each stretch, by arm, one value for each token.
    """
    by_text = {arm: [float(text[arm].mean()) for text in losses] for arm in losses[0]}
    means = {arm: sum(values) / len(values) for arm, values in by_text.items()}
    measured = difference([text["window"] - text["full"] for text in losses])
    cell: dict[str, Any] = {"another_text": None, **means, "gap_error": measured.error, "verdict": measured.verdict}
    cell |= {"gap_closed": None, "standard_error": None, "by_own_memory": None, "by_text": by_text}
    if measured.sign > 0:
        arms = {arm: by_text[arm] for arm in ARMS}
        cell["gap_closed"] = gap_closed(**{arm: means[arm] for arm in ARMS})
        cell["standard_error"] = jackknife(arms)
        if "another_text" in means:
            gained = means["another_text"] - means["memory"]
            cell["by_own_memory"] = gap_closed(means["full"], means["window"], means["window"] - gained)
    if not math.isfinite(cell["gap_error"]):
        cell["gap_error"] = None
    return cell


def jackknife(losses: dict[str, list[float]]) -> float | None:
    """Standard error of the gap closed over texts, each left out in turn; None for fewer than two."""
    count = len(losses["full"])
    if count < 2:
        return None
    means = [
        gap_closed(**{arm: (sum(values) - values[i]) / (count - 1) for arm, values in losses.items()})
        for i in range(count)
    ]
    center = sum(means) / count
    return float(((count - 1) / count * sum((u - center) ** 2 for u in means)) ** 0.5)


@contextmanager
def swapped_memories(model: Any) -> Iterator[None]:
    """Of two texts side by side, each reads the other's memory: what is left of the gain is not about this text."""

    def swap_scan(scan: Any) -> Any:
        def swapped(state: Any, q: Tensor, *tokens: Any) -> tuple[Tensor, Any]:
            reading, after = scan(state, q.flip(0), *tokens)
            return reading.flip(0), after

        return swapped

    def swap_push(push: Any) -> Any:
        def swapped(kept: Any, leaving: Any) -> Any:
            seen, leaving, after = push(kept, leaving)
            if seen is not None:
                turned = {name: getattr(seen, name).flip(0) for name in ("k", "v", "first", "last")}
                turn = None if seen.turn is None else type(seen.turn)(*(u.flip(0) for u in seen.turn))
                seen = replace(seen, **turned, turn=turn)
            return seen, leaving, after

        return swapped

    stores = stores_of(model)
    memories: list[Any] = [store.compressor for store in stores if store.compressor is not None]
    policies: list[Any] = [store.eviction for store in stores]
    for memory in memories:
        memory.scan = swap_scan(memory.scan)
    for policy in policies:
        policy.push = swap_push(policy.push)
    try:
        yield
    finally:
        for memory in memories:
            del memory.scan
        for policy in policies:
            del policy.push
