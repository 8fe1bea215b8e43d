"""What the kernel of a decode step knows of the slots beside the window: who stays in them, and their tensors."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class ScoreWeights(NamedTuple):
    """The parameters of a learned score, see ``LearnedScore``.

    Attributes:
        up: ``(I, N)``.
        up_bias: ``(I,)``.
        up_v: ``(I, E)``.
        down: ``(G, I)``.
        direct: ``(G, N)``.
        direct_bias: ``(G,)``.
    """

    up: Tensor
    up_bias: Tensor
    up_v: Tensor
    down: Tensor
    direct: Tensor
    direct_bias: Tensor


@dataclass(frozen=True)
class Contest:
    """How the token that leaves the window and those in slots compete: ``priority = score + rate * rank``.

    In each key/value head the one of least priority is lost, among equal ones the youngest.

    Attributes:
        score: the gate of the tokens in the window that is their score; None if it is ``given``.
        weights: how that score is computed from a hidden state and a value; None if the kernel cannot.
        given: the score of the token that leaves, ``(B, G, 1)`` float32.
        log_rate: the logarithm of the rate, ``(G,)``; None for ``rate``.
        rate: see there.
    """

    score: str | None = None
    weights: ScoreWeights | None = None
    given: Tensor | None = None
    log_rate: Tensor | None = None
    rate: float = 0.0


@dataclass(frozen=True)
class KeptSlots:
    """What an eviction keeps, as the kernel of a decode step changes it.

    Attributes:
        tensors: contiguous; the first three without a token dimension, the others by slot: ``filled``, ``folded`` and
            ``refused`` (see ``eviction.keep_best``; the last one if distances leave tokens out), ``k``, ``v``,
            ``priority``, ``rank``, ``left_out`` (likewise), ``score`` (if there are ``scores``), and the write gates.
        contest: who stays.
        scores: of the tokens in the window, ``(B, G, C)`` float32, if they ride there.
        new_score: of the new token, likewise; not looked at if the kernel computes it from ``x``.
        x: the hidden state of the new token, ``(B, 1, N)``.
        inv_freq: the frequencies of the rotation, None if it is not known.
        start: the first rotated channel.
        interleaved: how channels are paired.
        hidden: whether keys are folded without their rotation.
    """

    tensors: dict[str, Tensor]
    contest: Contest
    scores: Tensor | None
    new_score: Tensor | None
    x: Tensor | None
    inv_freq: Tensor | None
    start: int
    interleaved: bool
    hidden: bool

    def arguments(self, gates: list[str]) -> tuple[object, ...]:
        """As the kernel takes them, the write gates in this order."""
        compact = "refused" in self.tensors
        names = ["k", "v", "filled", "folded", "priority", "rank", *(["left_out", "refused"] if compact else [])]
        kept = [self.tensors[name] for name in names]
        if self.scores is not None:
            kept += [self.tensors["score"], self.scores]
        kept += [self.tensors[name] for name in gates]
        weights = [] if self.x is None or self.contest.weights is None else list(self.contest.weights)
        score = self.contest.given if self.scores is None else None if weights else self.new_score
        return (
            kept, score, self.x if weights else None, weights, self.contest.log_rate, self.contest.rate,
            self.scores is not None, compact, self.hidden, self.inv_freq if compact or self.hidden else None,
            self.start, self.interleaved,
        )  # fmt: skip
