"""A long window cut into pieces that need no mask but the causal one, for cuDNN's kernels, which know no windows."""

import torch
from torch import Tensor

from .join import join


def attend_in_pieces(
    q: Tensor,
    q_sinks: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    scale: float,
    window_size: int,
) -> tuple[Tensor, Tensor]:
    """Window attention as up to four attentions: what all queries see, what they see causally, what leaves, the sinks.

    Column ``j`` of the context leaves a full window before query ``j``: turned around, this is causal too.
    """
    length, columns = q.shape[2], context_k.shape[2]
    leaving = length if columns > window_size else 0
    middle, own = slice(leaving, columns - length), slice(columns - length, None)
    parts, backwards = [], None
    if columns > leaving + length:
        parts.append(cudnn(q, context_k[:, :, middle], context_v[:, :, middle], False, scale))
    parts.append(cudnn(q, context_k[:, :, own], context_v[:, :, own], True, scale))
    if leaving:
        backwards = len(parts)
        turned, k, v = (u[:, :, :length].flip(2) for u in (q, context_k, context_v))
        parts.append(cudnn(turned, k, v, True, scale))
    if sink_k.shape[2]:
        parts.append(cudnn(q_sinks, sink_k, sink_v, False, scale))
    outs, lses = zip(*parts, strict=True)
    return join(outs, lses, backwards=backwards)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention ``(b, t, h, d)`` and its log-sum-exp ``(b, h, t)``."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = attend(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out.transpose(1, 2), lse.reshape(q.shape[:3])
