"""Window attention in PyTorch's fused kernels: the form for half precision on a GPU.

A query's keys fall into two parts, the sinks and the last ``window_size`` tokens. Each part is one call of
FlashAttention (arXiv 2307.08691), which has sliding windows built in; the parts are joined by their log-sum-exps.
Backward, each part is given the joint output and the joint log-sum-exp: then its probabilities are those of the joint
softmax.

Dimensions as in ``window_attention``.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .triton_forms import in_triton

Part = tuple[Tensor, Tensor, Tensor, int | None]
"""Queries, keys, values, ``(b, t, h, d)`` each; how many tokens back a query sees, itself included, None for all."""


def supports(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether the fused kernels can take these tensors."""
    size = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and size == v.shape[-1] <= 256
        and size % 8 == 0
    )


def flash_window_attention(
    q: Float[Tensor, "b h t d"],
    q_sinks: Float[Tensor, "b h t d"],
    sink_k: Float[Tensor, "b g s d"],
    sink_v: Float[Tensor, "b g s d"],
    context_k: Float[Tensor, "b g c d"],
    context_v: Float[Tensor, "b g c d"],
    *,
    window_size: int,
    scale: float,
) -> Float[Tensor, "b h t d"]:
    """Every query sees all sinks, and of the context the last ``window_size`` columns up to its own.

    Args:
        q: queries; the last ``t`` columns of the context are their own.
        q_sinks: the queries as they face the sinks.
        sink_k: keys of the sinks, possibly none; no query's own.
        sink_v: their values.
        context_k: keys, without any sink.
        context_v: their values.
        window_size: tokens a query sees besides the sinks.
        scale: logit factor.
    """
    context_k, context_v = (u[:, :, -(q.shape[2] + window_size - 1) :] for u in (context_k, context_v))
    if _in_pieces(q, context_k, window_size):
        return _attend_in_pieces(q, q_sinks, sink_k, sink_v, context_k, context_v, scale)
    tensors = [u.transpose(1, 2) for u in (q, context_k, context_v)]
    if sink_k.shape[2]:
        tensors += [u.transpose(1, 2) for u in (q_sinks, sink_k, sink_v)]
    out: Tensor = _JointAttention.apply(window_size, scale, *tensors)
    return out.transpose(1, 2)


def _in_pieces(q: Tensor, context_k: Tensor, window_size: int) -> bool:
    """Whether the window, full for every query, is cut into pieces without masks but the causal one.

    cuDNN's kernels know no windows and are the fastest on Hopper, FlashAttention 2 skips what its window hides.
    """
    length = q.shape[2]
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # the device's properties are asked for
        and context_k.shape[2] == length + window_size - 1
        and window_size >= 2 * length >= 1024
        and _has_cudnn(q)
    )


def _has_cudnn(q: Tensor) -> bool:
    return (
        q.shape[-1] in (64, 128)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(q.device) == (9, 0)
    )


def _attend_in_pieces(
    q: Tensor, q_sinks: Tensor, sink_k: Tensor, sink_v: Tensor, context_k: Tensor, context_v: Tensor, scale: float
) -> Tensor:
    """Window attention as four attentions: what all queries see, what they see causally, what leaves, the sinks.

    Column ``j`` of the context leaves the window before query ``j``: turned around, this is causal too.
    """
    length = q.shape[2]
    middle, own = slice(length, context_k.shape[2] - length), slice(context_k.shape[2] - length, None)
    parts = [
        _cudnn(q, context_k[:, :, middle], context_v[:, :, middle], False, scale),
        _cudnn(q, context_k[:, :, own], context_v[:, :, own], True, scale),
    ]
    turned, k, v = (u[:, :, :length].flip(2) for u in (q, context_k, context_v))
    parts.append(_cudnn(turned, k, v, True, scale))
    if sink_k.shape[2]:
        parts.append(_cudnn(q_sinks, sink_k, sink_v, False, scale))
    outs, lses = zip(*parts, strict=True)
    return join(outs, lses, backwards=2)[0].transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention ``(b, t, h, d)`` and its log-sum-exp ``(b, h, t)``."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = attend(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


class _JointAttention(torch.autograd.Function):
    """One softmax over the window and, if there are any, the sinks."""

    @staticmethod
    def forward(ctx: Any, window_size: int, scale: float, *tensors: Tensor) -> Tensor:
        parts = _parts(tensors, window_size)
        outs, lses, extras = zip(*(_flash(part, scale) for part in parts), strict=True)
        out, lse = join(outs, lses)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.window_size, ctx.scale, ctx.extras = window_size, scale, extras
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        out, lse, *tensors = ctx.saved_tensors
        grads: list[Tensor] = []
        for part, extra in zip(_parts(tuple(tensors), ctx.window_size), ctx.extras, strict=True):
            grads += _flash_backward(grad.contiguous(), part, out, lse, extra, ctx.scale)
        return None, None, *grads


def join(
    outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], backwards: int | None = None
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h t"]]:
    """Attention over several sets of keys, from the attention over each.

    Args:
        outs: attention over each set, ``(b, t, h, d)``.
        lses: its log-sum-exp, ``(b, h, t)``.
        backwards: the one whose tokens come in reverse order, None for none.
    """
    if len(outs) == 1:
        return outs[0], lses[0]
    if in_triton(*outs) and outs[0].dtype != torch.float64 and not torch.compiler.is_compiling():
        from . import triton_join

        return triton_join.join(outs, lses, backwards)
    if backwards is not None:
        outs = tuple(u.flip(1) if i == backwards else u for i, u in enumerate(outs))
        lses = tuple(u.flip(2) if i == backwards else u for i, u in enumerate(lses))
    lse = torch.stack(lses).logsumexp(dim=0)
    total = torch.zeros_like(outs[0], dtype=lse.dtype)
    for out, part in zip(outs, lses, strict=True):
        total.addcmul_(out.to(lse.dtype), (part - lse).exp().transpose(1, 2).unsqueeze(-1))
    return total.to(outs[0].dtype), lse


def _parts(tensors: tuple[Tensor, ...], window_size: int) -> list[Part]:
    window: list[Part] = [(*tensors[:3], window_size)]  # type: ignore[list-item]
    return window if len(tensors) == 3 else [*window, (*tensors[3:], None)]  # type: ignore[list-item]


def _flash(part: Part, scale: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    q, k, v, back = part
    out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, back is not None, False, scale=scale, **_sides(back)
    )
    return out, lse, (seed, unused)


def _flash_backward(
    grad: Tensor, part: Part, out: Tensor, lse: Tensor, extra: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, back = part
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, back is not None, *extra, scale=scale,
        **_sides(back),
    )  # fmt: skip
    return grads


def _sides(back: int | None) -> dict[str, int]:
    return {} if back is None else {"window_size_left": back - 1, "window_size_right": 0}
