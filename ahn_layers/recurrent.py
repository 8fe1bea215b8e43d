"""Compressors that declare their recurrence: fold, read, scan and the rule of a decode step follow from it."""

from abc import abstractmethod
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from .compressor import Compressor, State
from .ops.decode.rule import StepRule
from .ops.pointwise.normalize import l2_normalize
from .ops.recurrence.declared import Recurrence, declared_scan, declared_step

__all__ = ["Recurrence", "Recurrent"]


class Recurrent(Compressor):
    """A compressor whose state is a matrix that decays and is written to in one direction at a time.

    Subclass it and write ``recurrence``. Long texts are folded in chunks, single tokens in the fused decode step. A
    subclass that overrides ``fold`` or ``read`` is folded token by token unless it overrides ``scan`` too.

    With momentum the state is two such matrices, ``"memory"`` and ``"momentum"``.

    Args:
        hidden_size: see [`Compressor`][ahn_layers.Compressor], as for the other sizes and ``shared_state``.

    Examples:
        >>> class Fading(Recurrent):
        ...     def gates(self, x):
        ...         return {"g": -0.01 * x.new_ones(x.shape[0], self.num_states, x.shape[1])}
        ...
        ...     def recurrence(self):
        ...         return Recurrence(decay="g")
        >>> from ahn_layers import check_compressor
        >>> check_compressor(Fading)
    """

    declared: ClassVar[bool] = True
    """Whether fold and read are what the recurrence says."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.declared = cls.fold is Recurrent.fold and cls.read is Recurrent.read
        own = cls.declared and cls.scan is Recurrent.scan and cls.rule is Recurrent.rule
        cls.rule_holds = own or (cls.rule_holds and cls.rule is not Recurrent.rule)

    @abstractmethod
    def recurrence(self) -> Recurrence:
        """One step, in the names of the gates."""

    def expand(self, gates: dict[str, Float[Tensor, "b s t *_"]]) -> dict[str, Float[Tensor, "b s t *_"]]:
        """Write gates as the recurrence takes them, from those that stayed in the window. Default: the same.

        For vectors that are made of a few numbers ([`LowRank`][ahn_layers.layers.LowRank]): the window holds these.
        """
        return gates

    def init_state(self, batch_size: int, like: Tensor) -> State:
        """An empty matrix, with momentum two."""
        empty = super().init_state(batch_size, like)
        assert isinstance(empty, Tensor)
        return empty if self.recurrence().momentum is None else {"memory": empty, "momentum": empty.clone()}

    def fold(
        self, state: State, k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"], *args: Any, **gates: Any
    ) -> State:
        """One step of the recurrence; gates by name or in its order."""
        step = self.recurrence()
        gates |= dict(zip(step.gates, args, strict=False))
        return declared_step(step, state, k, v, self.expand({name: u.unsqueeze(2) for name, u in gates.items()}))

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """``S^T q'``."""
        step = self.recurrence()
        matrix = state if isinstance(state, Tensor) else state["memory"]
        return super().read(matrix, l2_normalize(q, step.eps, step.read_scale))

    def scan(
        self,
        state: State,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b g t d"],
        v: Float[Tensor, "b g t e"],
        gates: dict[str, Tensor],
        mask: Bool[Tensor, "b t"] | Bool[Tensor, "b g t"] | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], State]:
        """The same, chunk by chunk."""
        if not self.declared:
            return super().scan(state, q, k, v, gates, mask)
        folds = None if mask is None else self.per_state(mask)
        return declared_scan(self.recurrence(), state, q, k, v, self.expand(gates), folds)

    def rule(self, x: Float[Tensor, "b 1 n"]) -> StepRule | None:
        """The same, one token; None for what a kernel has no words for: momentum, several writes, expanded gates."""
        step = self.recurrence()
        if step.momentum is not None or step.writes > 1 or type(self).expand is not Recurrent.expand:
            return None
        ours = {name: getattr(step, name) for name in ("decay", "rate", "strength", "delta", "read_scale", "eps")}
        if type(self).output is not Recurrent.output:
            return StepRule(**ours)
        gate = self.read_gate(x, widen=False)
        if gate is None:
            return StepRule(**ours, matrix=self.o_proj.weight)
        return StepRule(**ours, weight=self.o_norm.weight, gate=gate.squeeze(2), matrix=self.o_proj.weight)
