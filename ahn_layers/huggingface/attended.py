"""Whether a model's attention function computes the softmax attention that a memory's window computes."""

import torch
from torch import Tensor

from ..ops.attention.window_attention import masked_attention
from .interface import null_logits_of
from .trial import AttentionCall


def how_it_differs(call: AttentionCall, window: int | None) -> str:
    """Why a memory cannot stand in for this attention; empty if it computes the same."""
    if call.out is None or call.out.is_meta or not bool(call.out.isfinite().all()):
        return ""
    q, k, v = (u.detach().to(torch.promote_types(u.dtype, torch.float32)) for u in (call.q, call.k, call.v))
    mask, place = call.mask, torch.arange(q.shape[2], device=q.device)
    distance = place.unsqueeze(1) - place
    visible = ((distance >= 0) & (distance < (window or len(place))))[None, None]
    if isinstance(mask, Tensor) and mask.ndim == 4:  # a text without images may see ahead too, as a prefix
        visible = mask if mask.dtype == torch.bool else mask == 0
    ours = masked_attention(
        q,
        k,
        v,
        visible,
        scale=call.scaling,
        softcap=call.kwargs.get("softcap"),
        null_logits=null_logits_of(call.base, call.kwargs),
    ).transpose(1, 2)
    if call.out.shape == ours.shape and _is_close(call.out, ours, v):
        return ""
    return "computes something else than softmax attention over the keys up to its own, which a memory cannot honour"


def _is_close(actual: Tensor, expected: Tensor, v: Tensor) -> bool:
    precision = max(torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((actual - expected).abs().max() <= 64 * precision * v.abs().max())
