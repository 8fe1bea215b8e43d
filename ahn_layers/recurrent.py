"""Compressors that declare their recurrence: fold, read, scan and the rule of a decode step follow from it."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from .compressor import Compressor, State
from .layers import Scale, project
from .ops.decode.step import StepRule, delta_step
from .ops.pointwise.normalize import gated_rms_norm, l2_normalize
from .ops.recurrence.delta_scan import gated_delta_scan
from .ops.recurrence.linear_scan import gated_linear_scan
from .ops.recurrence.scan import as_operand


@dataclass(frozen=True)
class Recurrence:
    """One step of a memory, with ``u' = u / sqrt(|u|^2 + eps)``.

    ``S <- exp(rate decay) S``, then ``S <- S + k' (strength (v - S^T k'))^T``, without ``S^T k'`` unless ``delta``;
    ``r = read_scale S^T q'``.

    Args:
        decay: the gate that is the log decay; None for no decay.
        rate: its factor, ``(num_states,)``; None for one.
        strength: the gate that is the factor of what is written; None for one.
        delta: whether what is stored already is subtracted.
        read_scale: factor of the normalised queries.
        eps: see above.

    Examples:
        >>> Recurrence(decay="g", strength="beta", delta=True).gates
        ['g', 'beta']
    """

    decay: str | None = None
    rate: Tensor | None = None
    strength: str | None = None
    delta: bool = False
    read_scale: float = 1.0
    eps: float = 1e-6

    @property
    def gates(self) -> list[str]:
        """The names of the gates, in the order in which ``fold`` takes them."""
        return list(dict.fromkeys(name for name in (self.decay, self.strength) if name is not None))


class Recurrent(Compressor):
    """A compressor whose state is a matrix that decays and is written to in one direction at a time.

    Subclass it and write ``recurrence``. Long texts are folded in chunks, single tokens in the fused decode step. A
    subclass that overrides ``fold`` or ``read`` is folded token by token unless it overrides ``scan`` too.

    The output is an RMS norm and a matrix per head. With a layer ``g_proj`` and a module ``o_norm``, made in ``build``,
    the norm has a gate per head and a factor per channel.

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

    o_norm: Scale
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

    def fold(
        self, state: Tensor, k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"], *args: Any, **gates: Any
    ) -> Tensor:
        """One step of the recurrence; gates by name or in its order."""
        step = self.recurrence()
        gates |= dict(zip(step.gates, args, strict=False))
        if step.decay is not None:
            g = gates[step.decay] if step.rate is None else gates[step.decay] * step.rate.to(k.dtype)
            state = state * g.exp()[..., None, None]
        k, strength = l2_normalize(k, step.eps), None if step.strength is None else gates[step.strength]
        if step.delta:
            return delta_step(state, k, v, k.new_ones(k.shape[:2]) if strength is None else strength)
        return state + k.unsqueeze(-1) * (v if strength is None else strength.unsqueeze(-1) * v).unsqueeze(-2)

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """``S^T q'``."""
        step = self.recurrence()
        return super().read(state, l2_normalize(q, step.eps, step.read_scale))

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
        assert isinstance(state, Tensor)
        step = self.recurrence()
        q = l2_normalize(as_operand(q, state), step.eps, step.read_scale)
        k = l2_normalize(as_operand(k, state), step.eps)
        if mask is not None:
            gates = {name: gates[name].masked_fill(~self.per_state(mask), 0) for name in step.gates}
        g = None if step.decay is None else gates[step.decay]
        if g is not None and step.rate is not None:
            g = g.to(state.dtype) * step.rate.to(state.dtype).unsqueeze(-1)
        strength = None if step.strength is None else gates[step.strength]
        if step.delta and strength is None:
            strength = state.new_ones(*state.shape[:2], k.shape[2])
            strength = strength if mask is None else strength.masked_fill(~self.per_state(mask), 0)
        if step.delta and strength is not None:
            return gated_delta_scan(state, q, k, v, strength, g)
        if mask is not None and strength is None:
            k = k.masked_fill(~(mask if mask.ndim == 3 else mask.unsqueeze(1)).unsqueeze(3), 0)
        if strength is not None:
            v = strength.to(state.dtype).unflatten(1, (v.shape[1], -1)).unsqueeze(-1) * v.unsqueeze(2)
            v = v.flatten(1, 2).to(k.dtype)
        return gated_linear_scan(state, q, k, v, g)

    def read_gate(self, x: Float[Tensor, "b t n"], *, widen: bool = True) -> Float[Tensor, "b h t"] | None:
        """Logits of the gate of each reading; None without one."""
        linear = getattr(self, "g_proj", None)
        return None if linear is None else project(linear, x, widen=widen)

    def output(self, r: Float[Tensor, "b h t e"], x: Float[Tensor, "b t n"]) -> Float[Tensor, "b h t e"]:
        """RMS norm, read gate, a matrix per head."""
        gate = self.read_gate(x)
        if gate is None:
            return super().output(r, x)
        return self.o_proj(gated_rms_norm(r, self.o_norm.weight, gate))

    def rule(self, x: Float[Tensor, "b 1 n"]) -> StepRule:
        """The same, one token."""
        step = self.recurrence()
        ours = {name: getattr(step, name) for name in ("decay", "rate", "strength", "delta", "read_scale", "eps")}
        if type(self).output is not Recurrent.output:
            return StepRule(**ours)
        gate = self.read_gate(x, widen=False)
        if gate is None:
            return StepRule(**ours, matrix=self.o_proj.weight)
        return StepRule(**ours, weight=self.o_norm.weight, gate=gate.squeeze(2), matrix=self.o_proj.weight)
