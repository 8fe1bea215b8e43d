"""One decode step: attention of one query over the slots, and the kernels that fold and read along with it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..attention.window_attention import masked_attention
from . import forms
from .kept import KeptSlots
from .rule import StepRule


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

    Slots are filled in order, as many as a row has ``seen`` tokens; ``full`` says that all of them are, in every row.
    Other arguments as of ``masked_attention``.
    """
    plain = softcap is not None or null_logits is not None
    if not plain and forms.attends_in_triton(q, k, v):
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


_NOTHING_KEPT: tuple[object, ...] = ([], None, None, [], None, 0.0, False, False, False, None, 0, False)


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

    Runs in kernels, for tensors that ``fits_step``; ``Window.push`` and ``rule.follow`` say the same in plain PyTorch.

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
