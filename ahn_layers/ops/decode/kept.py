"""What the kernel of a decode step knows of the slots beside the window: who stays in them, and their tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Contest:
    """How the token that leaves the window and those in slots compete: ``priority = score + rate * rank``.

    In each key/value head the one of least priority is lost, among equal ones the youngest.

    Attributes:
        score: the gate of the tokens in the window that is their score; None if it is ``given``.
        given: the score of the token that leaves, ``(B, G, 1)`` float32.
        log_rate: the logarithm of the rate, ``(G,)``; None for ``rate``.
        rate: see there.
    """

    score: str | None = None
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
        new_score: of the new token, likewise.
        inv_freq: the frequencies of the rotation, None if it is not known.
        start: the first rotated channel.
        interleaved: how channels are paired.
        hidden: whether keys are folded without their rotation.
    """

    tensors: dict[str, Tensor]
    contest: Contest
    scores: Tensor | None
    new_score: Tensor | None
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
        score = self.contest.given if self.scores is None else self.new_score
        return (
            kept, score, self.contest.log_rate, self.contest.rate, self.scores is not None, compact, self.hidden,
            self.inv_freq if compact or self.hidden else None, self.start, self.interleaved,
        )  # fmt: skip
