"""What a memory does in a decode step, in the terms of the kernel."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..pointwise.normalize import l2_normalize, rms_normalize
from ..recurrence.declared import Recurrence, declared_step


@dataclass(frozen=True)
class StepRule(Recurrence):
    """How a memory folds one token and reads it, and what becomes of the reading.

    A [`Recurrence`][ahn_layers.Recurrence] of one write, without momentum and with scalar gates; with a ``matrix``,
    what is added to the attention is ``(rms(r) * weight * silu(gate)) matrix``.

    Attributes:
        weight: factor of the normalised reading, ``(E,)``; None for one.
        gate: logits of the reading's gate, ``(B, H)``; None for no gate.
        matrix: a matrix per head, ``(H, E, E)``; None if the output takes another form, which is then called for.
        norm_eps: in the RMS norm of the reading.

    Raises:
        ValueError: for momentum or several writes, for which the kernel has no words.
    """

    weight: Tensor | None = None
    gate: Tensor | None = None
    matrix: Tensor | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None or self.writes > 1:
            raise ValueError("momentum and several writes: expected neither in the rule of a decode step.")


def follow(
    rule: StepRule,
    memory: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b g 1 d"],
    v: Float[Tensor, "b g 1 e"],
    gates: dict[str, Float[Tensor, "b s 1 *_"]],
) -> tuple[Float[Tensor, "b h 1 e"] | None, Float[Tensor, "b h 1 e"], Float[Tensor, "b s d e"]]:
    """One token folded and one query answered by a rule: what the kernel of a decode step does, in plain PyTorch.

    Returns:
        What is added to the attention, None if the rule does not say; the reading; and the state after.
    """
    dtype, (k, v) = memory.dtype, (u.repeat_interleave(memory.shape[1] // u.shape[1], dim=1) for u in (k, v))
    after = declared_step(rule, memory, k.squeeze(2).to(dtype), v.squeeze(2).to(dtype), gates)
    assert isinstance(after, Tensor)
    asked = l2_normalize(q.to(dtype), rule.eps, rule.read_scale)
    reading = (asked.unflatten(1, (after.shape[1], -1)).squeeze(3) @ after).flatten(1, 2).unsqueeze(2)
    if rule.matrix is None:
        return None, reading, after
    added = rms_normalize(reading, rule.norm_eps)
    if rule.weight is not None:
        added = added * rule.weight.to(dtype)
    if rule.gate is not None:
        added = added * F.silu(rule.gate.to(dtype))[..., None, None]
    return added @ rule.matrix.to(dtype), reading, after
