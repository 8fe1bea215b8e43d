"""A recurrence in the names of its gates: one step of it, and its scan over many tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..decode.fold import delta_step
from ..pointwise.normalize import l2_normalize
from .channel_scan import channel_scan
from .delta_scan import gated_delta_scan
from .forms import as_operand
from .linear_scan import gated_linear_scan
from .momentum_scan import momentum_scan, momentum_step

State = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Recurrence:
    """One step of a memory, with ``u' = u / sqrt(|u|^2 + eps)``.

    ``S <- exp(rate decay) S``, then ``S <- S + k' (strength (v - S^T k'))^T``, without ``S^T k'`` unless ``delta``;
    ``r = read_scale S^T q'``.

    Args:
        decay: the gate that is the log decay, a scalar per state or a vector, one number per channel of the keys; None
            for no decay.
        rate: its factor, ``(num_states,)``; None for one. Without ``decay`` it is itself the log decay.
        strength: the gate that is the factor of what is written; None for one.
        delta: whether what is stored already is subtracted.
        momentum: the gate that is the log of what is kept of the momentum. With it ``Z <- exp(momentum) Z + k'
            (strength (v - S^T k'))^T``, then ``S <- exp(rate decay) S + Z``. It needs ``delta`` and a scalar decay.
        more_keys: for several writes a token, one after the other, the decay before the first: matrices that make the
            further keys from the first, ``(num_states, writes - 1, D, D)``. The strength is then a vector, a number per
            write. They need ``delta`` and a scalar decay.
        more_values: likewise for the values, ``(num_states, writes - 1, E, E)``.
        read_scale: factor of the normalised queries.
        eps: see above.

    Raises:
        ValueError: for momentum or several writes without ``delta``, or both together.

    Examples:
        >>> Recurrence(decay="g", strength="beta", delta=True).gates
        ['g', 'beta']
    """

    decay: str | None = None
    rate: Tensor | None = None
    strength: str | None = None
    delta: bool = False
    momentum: str | None = None
    more_keys: Tensor | None = None
    more_values: Tensor | None = None
    read_scale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        several = self.more_keys is not None
        if several != (self.more_values is not None):
            raise ValueError("more_keys and more_values: expected both or neither.")
        for name, asked in (("momentum", self.momentum is not None), ("more_keys", several)):
            if asked and not self.delta:
                raise ValueError(f"{name} with delta=False: expected delta=True.")
        if several and (self.momentum is not None or self.strength is None):
            raise ValueError("more_keys: expected a strength with one number per write, and no momentum.")

    @property
    def gates(self) -> list[str]:
        """The names of the gates, in the order in which ``fold`` takes them."""
        return list(dict.fromkeys(name for name in (self.decay, self.strength, self.momentum) if name is not None))

    @property
    def writes(self) -> int:
        """Writes per token."""
        return 1 if self.more_keys is None else 1 + self.more_keys.shape[1]

    def all_of(
        self, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"]
    ) -> tuple[Float[Tensor, "b s t w d"], Float[Tensor, "b s t w e"]]:
        """The keys and values of all writes of each token."""
        if self.more_keys is None or self.more_values is None:
            return k.unsqueeze(3), v.unsqueeze(3)
        return _with_more(k, self.more_keys), _with_more(v, self.more_values)


def _with_more(u: Float[Tensor, "b g t d"], matrices: Float[Tensor, "s m d d"]) -> Float[Tensor, "b s t w d"]:
    u = u.repeat_interleave(len(matrices) // u.shape[1], dim=1)
    more = torch.einsum("bstd,smde->bstme", u, matrices.to(u.dtype))
    return torch.cat((u.unsqueeze(3), more), dim=3)


def declared_step(
    step: Recurrence,
    state: State,
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    gates: dict[str, Float[Tensor, "b s 1 *_"]],
) -> State:
    """One token folded, in plain PyTorch; key and value come in the dtype of the state, the key not normalised."""
    gates = {name: gates[name].to(k.dtype) for name in step.gates}
    g = _decays(step, gates, k.unsqueeze(2), None)
    g = None if g is None else g.squeeze(2).to(k.dtype)
    strength = k.new_ones(k.shape[:2]) if step.strength is None else gates[step.strength].squeeze(2)
    if step.momentum is not None:
        assert isinstance(state, dict)
        key, m = l2_normalize(k, step.eps), gates[step.momentum].squeeze(2)
        after = momentum_step(state["memory"], state["momentum"], key, v, strength, m, g)
        return dict(zip(("memory", "momentum"), after, strict=True))
    assert isinstance(state, Tensor)
    if g is not None:
        state = state * (g if g.ndim == 3 else g.unsqueeze(-1)).exp().unsqueeze(-1)
    keys, values = step.all_of(k.unsqueeze(2), v.unsqueeze(2))
    strengths = strength if strength.ndim == 3 else strength.unsqueeze(-1)
    for i in range(step.writes):
        key, value, beta = l2_normalize(keys[:, :, 0, i], step.eps), values[:, :, 0, i], strengths[:, :, i]
        if step.delta:
            state = delta_step(state, key, value, beta)
        else:
            state = state + key.unsqueeze(-1) * (beta.unsqueeze(-1) * value).unsqueeze(-2)
    return state


def declared_scan(
    step: Recurrence,
    state: State,
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t e"],
    gates: dict[str, Float[Tensor, "b s t *_"]],
    folds: Bool[Tensor, "b _ t"] | None,
) -> tuple[Float[Tensor, "b h t e"], State]:
    """For each token in turn: fold it, then read with its query.

    Args:
        step: the recurrence.
        state: a matrix per state, with momentum two of them by name.
        q: queries, not normalised.
        k: keys, likewise.
        v: values.
        gates: at least those that the recurrence names.
        folds: False where nothing is folded, for all states or for each.

    Returns:
        Readings, in the dtype of the state or of ``k``, and the state after the last token.
    """
    if folds is not None:
        gates = {name: gates[name].masked_fill(~_like(folds, gates[name]), 0) for name in step.gates}
    g, strength = _decays(step, gates, k, folds), None if step.strength is None else gates[step.strength]
    by_channel = g is not None and g.ndim == 4
    matrix = state if isinstance(state, Tensor) else state["memory"]
    q = l2_normalize(as_operand(q, matrix, by_channel=by_channel), step.eps, step.read_scale)
    if step.writes == 1:
        k = l2_normalize(as_operand(k, matrix, by_channel=by_channel), step.eps)
    if step.delta and strength is None:
        strength = matrix.new_ones(*matrix.shape[:2], k.shape[2])
        strength = strength if folds is None else strength.masked_fill(~folds, 0)
    if step.momentum is not None:
        assert isinstance(state, dict) and strength is not None
        r, *after = momentum_scan(matrix, state["momentum"], q, k, v, strength, gates[step.momentum], g, folds)
        return r, dict(zip(("memory", "momentum"), after, strict=True))
    if step.delta and strength is not None:
        if step.writes > 1:
            return _several(step, matrix, q, k, v, strength, g)
        if g is not None and by_channel:
            return channel_scan(matrix, q, k, v, g, strength)
        return gated_delta_scan(matrix, q, k, v, strength, g)
    if strength is not None:
        v = strength.to(matrix.dtype).unflatten(1, (v.shape[1], -1)).unsqueeze(-1) * v.unsqueeze(2)
        v = v.flatten(1, 2).to(k.dtype)
    elif folds is not None:
        k = k.repeat_interleave(folds.shape[1] // k.shape[1], dim=1) if folds.shape[1] > k.shape[1] else k
        k = k.masked_fill(~folds.unsqueeze(3), 0)
    if g is not None and by_channel:
        return channel_scan(matrix, q, k, v, g)
    return gated_linear_scan(matrix, q, k, v, g)


def _like(mask: Bool[Tensor, "b _ t"], gate: Tensor) -> Tensor:
    """The mask for a gate, which may be a vector."""
    return mask if gate.ndim == 3 else mask.unsqueeze(-1)


def _decays(
    step: Recurrence, gates: dict[str, Tensor], k: Tensor, folds: Tensor | None
) -> Float[Tensor, "b s t *d"] | None:
    """The log decay of each token; gates are masked already, a rate without a gate is not."""
    rate = step.rate
    if step.decay is None:
        if rate is None:
            return None
        g = rate.view(1, -1, 1).expand(k.shape[0], -1, k.shape[2])
        return g if folds is None else g.masked_fill(~folds, 0)
    g = gates[step.decay]
    return g if rate is None else g.to(rate.dtype) * rate.view(-1, *[1] * (g.ndim - 2))


def _several(
    step: Recurrence, state: Tensor, q: Tensor, k: Tensor, v: Tensor, strength: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Several writes a token: as many tokens in a row, of which the first alone decays and the last alone is read."""
    writes = step.writes
    k, v = (u.flatten(2, 3) for u in step.all_of(k, v))
    k, v = l2_normalize(as_operand(k, state), step.eps), v.to(k.dtype)
    q = torch.stack([*[torch.zeros_like(q)] * (writes - 1), q], dim=3).flatten(2, 3)
    if g is not None:
        g = torch.stack([g, *[torch.zeros_like(g)] * (writes - 1)], dim=3).flatten(2, 3)
    r, state = gated_delta_scan(state, q, k, v, strength.flatten(2, 3), g)
    return r[:, :, writes - 1 :: writes], state
