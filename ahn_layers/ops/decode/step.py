"""One decode step: attention of one query over the slots, and one token folded and read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..attention.window_attention import masked_attention
from ..pointwise.normalize import l2_normalize, rms_normalize
from ..triton_forms import in_triton


def slot_attention(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b g c d"],
    v: Float[Tensor, "b g c e"],
    seen: Int[Tensor, " b"],
    *,
    full: bool,
    scale: float | None = None,
    softcap: float | None = None,
    q_sinks: Float[Tensor, "b h 1 d"] | None = None,
    num_sinks: int = 0,
    null_logits: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h 1 e"]:
    """Attention of one query per row over the slots that are filled; an empty row sees its first slot.

    Args:
        q: queries.
        k: keys by slot.
        v: values by slot.
        seen: tokens seen in each row; slots are filled in order.
        full: whether every slot of every row is known to be filled.
        scale: logit factor, default ``d ** -0.5``.
        softcap: see ``masked_attention``.
        q_sinks: queries to use against the first ``num_sinks`` slots.
        num_sinks: how many leading slots are sinks.
        null_logits: see ``masked_attention``.
    """
    plain = softcap is not None or null_logits is not None
    if not plain and q.dtype != torch.float64 and q.shape[-1] <= 256 and in_triton(q, k, v):
        from . import triton_decode

        turned, facing = (q, 0) if q_sinks is None else (q_sinks, num_sinks)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return triton_decode.slot_attention(q, turned, k, v, seen, facing, scale)
    visible = None
    if not full:
        visible = (torch.arange(k.shape[2], device=q.device) < seen.clamp(min=1).unsqueeze(1))[:, None, None]
    return masked_attention(
        q, k, v, visible, scale=scale, softcap=softcap, q_sinks=q_sinks, num_sinks=num_sinks, null_logits=null_logits
    )


def delta_step(
    state: Float[Tensor, "b s d e"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    beta: Float[Tensor, "b s"],
    *,
    fresh: bool = False,
) -> Float[Tensor, "b s d e"]:
    """``S + k (beta (v - S^T k))^T`` for one token; a ``fresh`` state, which nobody else knows, is overwritten."""
    stored = (k.unsqueeze(-2) @ state).squeeze(-2)
    add = Tensor.addcmul_ if fresh and not torch.is_grad_enabled() else torch.addcmul
    return add(state, k.unsqueeze(-1), (beta.unsqueeze(-1) * (v - stored)).unsqueeze(-2))


def log_decay(
    decay: str | None, rate: Float[Tensor, " s"] | None, gates: Mapping[Any, Tensor], like: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"] | Float[Tensor, "b s d"] | None:
    """The log decay of one token: its gate times a rate, or either alone; None for none.

    Args:
        decay: name of the gate.
        rate: see above.
        gates: those of the token, ``(B, S)`` or ``(B, S, D)``.
        like: a tensor with the shape of a scalar gate, and its dtype.
    """
    if decay is None:
        return None if rate is None else rate.to(like.dtype).expand_as(like)
    g = gates[decay]
    return g if rate is None else g * rate.to(g.dtype).view(-1, *[1] * (g.ndim - 2))


def fold_and_read(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    g: Float[Tensor, "b s"] | Float[Tensor, "b s d"] | None = None,
    beta: Float[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b h e"], Float[Tensor, "b s d e"]]:
    """``S <- exp(g) S``, then ``S + k v^T`` or, with ``beta``, ``S + k (beta (v - S^T k))^T``; read ``S^T q``.

    Args:
        state: the state before; its dtype is that of all tensors.
        q: queries; those of one group share a state.
        k: the folded keys.
        v: the folded values.
        g: log decay, one per state or one per channel of the key; None for no decay.
        beta: write strength of the delta rule, None to add.

    Returns:
        What each query reads, and the state after.
    """
    by_channel = g is not None and g.ndim == 3
    if state.dtype == torch.float32 and not by_channel and in_triton(state, q, k, v, g, beta):
        from . import triton_decode

        return triton_decode.fold_and_read(state, q, k, v, g, beta)
    if g is not None:
        state = state * (g if by_channel else g.unsqueeze(-1)).exp().unsqueeze(-1)
    if beta is None:
        state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    else:
        state = delta_step(state, k, v, beta, fresh=g is not None)
    grouped = q.reshape(len(q), state.shape[1], -1, q.shape[-1])
    return (grouped @ state).flatten(1, 2), state


@dataclass(frozen=True)
class StepRule:
    """How a memory folds one token and reads it, in the terms of the kernel of a decode step.

    With ``u' = u / sqrt(|u|^2 + eps)``: ``S <- exp(rate decay) S``, then ``S <- S + k' (strength (v - S^T k'))^T``,
    without ``S^T k'`` unless ``delta``; ``r = read_scale S^T q'``; with a ``matrix``, what is added to the attention is
    ``(rms(r) * weight * silu(gate)) matrix``.

    Attributes:
        decay: the write gate that is the log decay, of a state or of each channel of its keys; None for no decay.
        rate: its factor, ``(S,)``; None for one. Without ``decay`` it is the log decay of every token.
        strength: the write gate that is the factor of what is written; None for one.
        delta: whether what is stored already is subtracted.
        read_scale: factor of the normalised queries.
        eps: see above.
        weight: factor of the normalised reading, ``(E,)``; None for one.
        gate: logits of the reading's gate, ``(B, H)``; None for no gate.
        matrix: a matrix per head, ``(H, E, E)``; None if the output takes another form, which is then called for.
        norm_eps: in the RMS norm of the reading.
    """

    decay: str | None = None
    rate: Tensor | None = None
    strength: str | None = None
    delta: bool = False
    read_scale: float = 1.0
    eps: float = 1e-6
    weight: Tensor | None = None
    gate: Tensor | None = None
    matrix: Tensor | None = None
    norm_eps: float = 1e-5


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


_NOTHING_KEPT: tuple[object, ...] = ([], None, None, 0.0, False, False, False, None, 0, False)


def fits_step(q: Tensor, slots: list[Tensor], memory: object, kept: dict[str, Tensor] | None = None) -> bool:
    """Whether ``decode_step`` runs in kernels for such tensors.

    Args:
        q: queries.
        slots: keys, values and write gates by slot.
        memory: the state, None for none.
        kept: what is kept beside the window.
    """
    sizes = max(q.shape[-1], slots[1].shape[-1]) <= 256 and len(slots) <= 4 and all(u.ndim == 3 for u in slots[2:])
    dtypes = q.dtype != torch.float64 and len({u.dtype for u in (q, *slots)}) == 1
    state = isinstance(memory, Tensor) and memory.dtype == torch.float32 and memory.is_contiguous()
    held = list((kept or {}).values())
    return (
        sizes
        and dtypes
        and (state or (memory is None and bool(held)))
        and all(u.is_contiguous() for u in held)
        and in_triton(q, *slots, *held)
    )


def decode_step(
    q: Float[Tensor, "b h 1 d"],
    new: tuple[Float[Tensor, "b g 1 d"], Float[Tensor, "b g 1 e"], dict[str, Float[Tensor, "b s 1"]]],
    slots: tuple[Float[Tensor, "b g c d"], Float[Tensor, "b g c e"], dict[str, Float[Tensor, "b s c"]]],
    seen: Int[Tensor, " b"],
    memory: Float[Tensor, "b s d e"] | None,
    rule: StepRule,
    *,
    num_sinks: int,
    scale: float | None = None,
    q_sinks: Float[Tensor, "b h 1 d"] | None = None,
    asking: Float[Tensor, "b h 1 d"] | None = None,
    key: Float[Tensor, "b g 1 d"] | None = None,
    kept: KeptSlots | None = None,
) -> tuple[Float[Tensor, "b h 1 e"], Float[Tensor, "b h 1 e"]]:
    """In place: the token that leaves is folded, the new one takes its slot and is counted; then attend and read.

    Runs in kernels, for tensors that ``fits_step``; ``Window.push`` and ``follow`` say the same in plain PyTorch.

    Args:
        q: queries.
        new: key, value and write gates of the new token.
        slots: keys, values and gates by slot, in the order of ``Window``.
        seen: tokens seen before, in each row; with ``c`` of them or more, one leaves.
        memory: the state, float32; None for none.
        rule: how it is folded and read.
        num_sinks: leading slots that are never overwritten.
        scale: logit factor, default ``d ** -0.5``.
        q_sinks: queries to use against the sinks.
        asking: the queries as they read the memory, if they differ.
        key: of the token that leaves, if it is folded under another one than it has in its slot.
        kept: the slots that the token that leaves competes for, None for none.

    Returns:
        The attention, with what the memory adds if the rule says how, and the reading, zero where no token left.
    """
    from . import triton_step

    (k, v, arriving), (k_slots, v_slots, gates) = new, slots
    turned, facing = (q, 0) if q_sinks is None else (q_sinks, num_sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    places = {None: -1} | {name: i for i, name in enumerate(gates)}
    return triton_step.decode_step(
        q, turned, k, v, [arriving[name] for name in gates], k_slots, v_slots, list(gates.values()), seen,
        num_sinks, facing, scale, memory, asking, key, places[rule.decay], places[rule.strength], rule.rate,
        rule.delta, rule.eps, rule.read_scale, rule.weight, rule.gate, rule.matrix, rule.norm_eps,
        *(_NOTHING_KEPT if kept is None else kept.arguments(list(gates))),
    )  # fmt: skip


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
    repeats, dtype = memory.shape[1] // k.shape[1], memory.dtype
    gate = {name: u.squeeze(2).to(dtype) for name, u in gates.items()}
    key = l2_normalize(k.squeeze(2).to(dtype), rule.eps).repeat_interleave(repeats, dim=1)
    value = v.squeeze(2).to(dtype).repeat_interleave(repeats, dim=1)
    g = log_decay(rule.decay, rule.rate, gate, memory[:, :, 0, 0])
    strength = torch.ones_like(key[..., 0]) if rule.strength is None else gate[rule.strength]
    if not rule.delta:
        value = strength.unsqueeze(-1) * value
    asked = l2_normalize(q.to(dtype), rule.eps, rule.read_scale).squeeze(2)
    reading, after = fold_and_read(memory, asked, key, value, g, strength if rule.delta else None)
    reading = reading.unsqueeze(2)
    if rule.matrix is None:
        return None, reading, after
    added = rms_normalize(reading, rule.norm_eps)
    if rule.weight is not None:
        added = added * rule.weight.to(dtype)
    if rule.gate is not None:
        added = added * F.silu(rule.gate.to(dtype))[..., None, None]
    return added @ rule.matrix.to(dtype), reading, after
