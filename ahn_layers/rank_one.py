"""Compressors that declare what a token does to the state as a diagonal and a matrix of rank one."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from .compressor import Compressor, State, state_dtype
from .ops.recurrence.channel_scan import rank_one_scan, rank_one_step
from .ops.recurrence.forms import as_operand


@dataclass(frozen=True)
class Transition:
    """``S <- diag(exp(decay)) S + along (S^T erased)^T + key value^T``, a vector of each per token.

    Attributes:
        decay: log decay of each channel of the keys, ``(B, num_states, T, D)``.
        erased: the key under which the state, as it was before the token, is read.
        along: the key under which what was read is added: ``-beta erased`` takes a share of ``beta`` off.
        key: the key under which the value is written.
        value: ``(B, num_states, T, E)``.

    Examples:
        >>> import torch
        >>> k, v = torch.ones(2, 1, 2, 3, 8)
        >>> delta_rule = Transition(decay=0 * k, erased=k, along=-0.5 * k, key=0.5 * k, value=v)
    """

    decay: Float[Tensor, "b s t d"]
    erased: Float[Tensor, "b s t d"]
    along: Float[Tensor, "b s t d"]
    key: Float[Tensor, "b s t d"]
    value: Float[Tensor, "b s t e"]


class DiagonalPlusRankOne(Compressor):
    """A compressor whose state a token changes by a diagonal and a matrix of rank one.

    For recurrences that [`Recurrent`][ahn_layers.Recurrent] has no words for: those that erase under another key than
    they write to. Subclass it and write ``transition``, from which fold, scan and, with ``query``, read follow.

    Args:
        hidden_size: see [`Compressor`][ahn_layers.Compressor], as for the other sizes and ``shared_state``.

    Examples:
        >>> class EraseThenAdd(DiagonalPlusRankOne):
        ...     def transition(self, k, v):
        ...         k = k / k.norm(dim=-1, keepdim=True)
        ...         return Transition(decay=0 * k - 0.01, erased=k, along=-0.5 * k, key=k, value=v)
        >>> from ahn_layers import check_compressor
        >>> check_compressor(EraseThenAdd)
    """

    @abstractmethod
    def transition(
        self, k: Float[Tensor, "b s t d"], v: Float[Tensor, "b s t e"], *args: Any, **gates: Any
    ) -> Transition:
        """What each token does to the state; tokens do not mix.

        Args:
            k: keys, in the dtype of the state.
            v: values, likewise.
            *args: not used; subclasses take their write gates as named parameters, ``(B, num_states, T)`` or
                ``(B, num_states, T, C)`` each.
            **gates: likewise.
        """

    def query(self, q: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Queries as they read the state. Default: as they are."""
        return q

    def fold(
        self, state: Tensor, k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"], *args: Any, **gates: Any
    ) -> Tensor:
        """The transition of one token."""
        one = {name: gate.unsqueeze(2) for name, gate in gates.items()}
        step = self.transition(k.unsqueeze(2), v.unsqueeze(2), *(gate.unsqueeze(2) for gate in args), **one)
        vectors = (step.key, step.value, step.decay, step.erased, step.along)
        return rank_one_step(state, *(u.squeeze(2) for u in vectors))

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """``S^T query(q)``."""
        return super().read(state, self.query(q.unsqueeze(2)).squeeze(2))

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
        assert isinstance(state, Tensor)
        dtype, operand = state_dtype(state), as_operand(k, state, by_channel=True).dtype
        wide = [u.repeat_interleave(self.num_states // u.shape[1], dim=1).to(dtype) for u in (k, v)]
        step = self.transition(*wide, **{name: gate.to(dtype) for name, gate in gates.items()})
        vectors = [step.decay, step.erased, step.along, step.key, step.value]
        if mask is not None:
            folds = self.per_state(mask).unsqueeze(-1)
            vectors = [u.masked_fill(~folds, 0) for u in vectors]
        decay, *rest = vectors
        erased, along, key, value = (u.to(operand) for u in rest)
        return rank_one_scan(state, self.query(q.to(dtype)).to(operand), key, value, decay, erased, along)
