"""One decode step: attention of one query over the slots, and one token folded and read."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .normalize import l2_normalize, rms_normalize
from .triton_forms import in_triton
from .window_attention import masked_attention


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
    """
    if softcap is None and q.dtype != torch.float64 and q.shape[-1] <= 256 and in_triton(q, k, v):
        from . import triton_decode

        turned, facing = (q, 0) if q_sinks is None else (q_sinks, num_sinks)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return triton_decode.slot_attention(q, turned, k, v, seen, facing, scale)
    visible = None
    if not full:
        visible = (torch.arange(k.shape[2], device=q.device) < seen.clamp(min=1).unsqueeze(1))[:, None, None]
    return masked_attention(q, k, v, visible, scale=scale, softcap=softcap, q_sinks=q_sinks, num_sinks=num_sinks)


def delta_step(
    state: Float[Tensor, "b s d e"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    beta: Float[Tensor, "b s"],
) -> Float[Tensor, "b s d e"]:
    """``S + k (beta (v - S^T k))^T`` for one token."""
    stored = (k.unsqueeze(-2) @ state).squeeze(-2)
    return state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * (v - stored)).unsqueeze(-2)


def fold_and_read(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s e"],
    g: Float[Tensor, "b s"] | None = None,
    beta: Float[Tensor, "b s"] | None = None,
) -> tuple[Float[Tensor, "b h e"], Float[Tensor, "b s d e"]]:
    """``S <- exp(g) S``, then ``S + k v^T`` or, with ``beta``, ``S + k (beta (v - S^T k))^T``; read ``S^T q``.

    Args:
        state: the state before; its dtype is that of all tensors.
        q: queries; those of one group share a state.
        k: the folded keys.
        v: the folded values.
        g: log decay, None for no decay.
        beta: write strength of the delta rule, None to add.

    Returns:
        What each query reads, and the state after.
    """
    if state.dtype == torch.float32 and in_triton(state, q, k, v, g, beta):
        from . import triton_decode

        return triton_decode.fold_and_read(state, q, k, v, g, beta)
    if g is not None:
        state = state * g.exp()[..., None, None]
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2) if beta is None else delta_step(state, k, v, beta)
    return (q.unflatten(1, (state.shape[1], -1)) @ state).flatten(1, 2), state


@dataclass(frozen=True)
class StepRule:
    """How a memory folds one token and reads it, in the terms of the kernel of a decode step.

    With ``u' = u / sqrt(|u|^2 + eps)``: ``S <- exp(g) S``, then ``S <- S + k' (strength (v - S^T k'))^T``, without
    ``S^T k'`` unless ``delta``; ``r = read_scale S^T q'``; with a ``matrix``, what is added to the attention is
    ``(rms(r) * weight * silu(gate)) matrix``.

    Attributes:
        g: log decay, ``(B, S)``; None for no decay.
        strength: factor of what is written, ``(B, S)``; None for one.
        delta: whether what is stored already is subtracted.
        read_scale: factor of the normalised queries.
        eps: see above.
        weight: factor of the normalised reading, ``(E,)``; None for one.
        gate: logits of the reading's gate, ``(B, H)``; None for no gate.
        matrix: a matrix per head, ``(H, E, E)``; None if the output takes another form, which is then called for.
        norm_eps: in the RMS norm of the reading.
    """

    g: Tensor | None = None
    strength: Tensor | None = None
    delta: bool = False
    read_scale: float = 1.0
    eps: float = 1e-6
    weight: Tensor | None = None
    gate: Tensor | None = None
    matrix: Tensor | None = None
    norm_eps: float = 1e-5


def fits_step(q: Tensor, slots: list[Tensor], memory: object) -> bool:
    """Whether ``exchange``, ``attend_and_fold`` and ``slot_attention`` run in kernels for such tensors.

    Args:
        q: queries.
        slots: keys, values and gates by slot.
        memory: the state, None for none.
    """
    sizes = max(q.shape[-1], slots[1].shape[-1]) <= 256 and len(slots) <= 4
    half = q.dtype != torch.float64 and len({u.dtype for u in (q, *slots)}) == 1
    state = memory is None or (isinstance(memory, Tensor) and memory.dtype == torch.float32 and memory.is_contiguous())
    return sizes and half and state and in_triton(q, *slots)


def exchange(slots: list[Tensor], new: list[Tensor], seen: Int[Tensor, " b"], num_sinks: int) -> list[Tensor]:
    """In place: one token of every row takes the slot of its rank and is counted; returned is what was there.

    Args:
        slots: keys ``(B, G, C, D)``, values ``(B, G, C, E)``, and gates ``(B, S, C)``, two at most in the kernel.
        new: the same with one column.
        seen: tokens seen before; the slots hold them in the order of ``Window``.
        num_sinks: leading slots that are never overwritten.
    """
    if len(new) <= 4 and in_triton(*slots, *new):
        from . import triton_step

        evicted = [u.new_empty(u.shape) for u in new]
        triton_step.exchange(slots, new, evicted, seen, num_sinks)
        return evicted
    rank = torch.where(seen < num_sinks, seen, num_sinks + (seen - num_sinks) % (slots[0].shape[2] - num_sinks))
    evicted = []
    for u, token in zip(slots, new, strict=True):
        at = rank.view(-1, *[1] * (u.ndim - 1)).expand_as(token)
        evicted.append(u.gather(2, at))
        u.scatter_(2, at, token)
    seen += 1
    return evicted


def attend_and_fold(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b g c d"],
    v: Float[Tensor, "b g c e"],
    seen: Int[Tensor, " b"],
    memory: Float[Tensor, "b s d e"],
    asking: Float[Tensor, "b h 1 d"],
    key: Float[Tensor, "b g 1 d"],
    value: Float[Tensor, "b g 1 e"],
    rule: StepRule,
    *,
    scale: float | None = None,
    q_sinks: Float[Tensor, "b h 1 d"] | None = None,
    num_sinks: int = 0,
) -> tuple[Float[Tensor, "b h 1 e"], Float[Tensor, "b h 1 e"]]:
    """``slot_attention`` while the token that left is folded into the memory, in place, and the memory is read.

    Args:
        q: queries.
        k: keys by slot.
        v: values by slot.
        seen: tokens seen in each row, the new one included; with more than ``c`` of them one has left.
        memory: the state, float32.
        asking: the queries as they read the memory.
        key: of the token that left.
        value: of the token that left.
        rule: how it is folded and read.
        scale: logit factor, default ``d ** -0.5``.
        q_sinks: queries to use against the first ``num_sinks`` slots.
        num_sinks: how many leading slots are sinks.

    Returns:
        The attention, with what the memory adds if the rule says how, and the reading, zero where no token left.
    """
    if in_triton(q, k, v, memory):
        from . import triton_step

        turned, facing = (q, 0) if q_sinks is None else (q_sinks, num_sinks)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return triton_step.attend_and_fold(
            q, turned, k, v, seen, facing, scale, asking, key, value, rule.g, rule.strength, memory, rule.delta,
            rule.eps, rule.read_scale, rule.weight, rule.gate, rule.matrix, rule.norm_eps,
        )  # fmt: skip
    out = slot_attention(q, k, v, seen, full=False, scale=scale, q_sinks=q_sinks, num_sinks=num_sinks)
    repeats = memory.shape[1] // key.shape[1]
    asked = l2_normalize(asking.to(memory.dtype), rule.eps, rule.read_scale).squeeze(2)
    key, value = (u.to(memory.dtype).squeeze(2).repeat_interleave(repeats, dim=1) for u in (key, value))
    key = l2_normalize(key, rule.eps)
    g, strength = (None if u is None else u.to(memory.dtype) for u in (rule.g, rule.strength))
    if strength is not None and not rule.delta:
        value, strength = strength.unsqueeze(-1) * value, None
    if rule.delta and strength is None:
        strength = torch.ones_like(key[..., 0])
    reading, after = fold_and_read(memory, asked, key, value, g, strength)
    left = (seen > k.shape[2]).view(-1, 1, 1, 1)
    memory.copy_(torch.where(left, after, memory))
    reading = torch.where(left, reading.unsqueeze(2), 0)
    if rule.matrix is None:
        return out, reading
    recalled = rms_normalize(reading, rule.norm_eps)
    if rule.weight is not None:
        recalled = recalled * rule.weight.to(recalled.dtype)
    if rule.gate is not None:
        recalled = recalled * torch.nn.functional.silu(rule.gate.to(recalled.dtype))[..., None, None]
    return out + (recalled @ rule.matrix.to(recalled.dtype)).to(out.dtype), reading
