"""Window attention in PyTorch's fused kernels: the form for half precision on a GPU.

A query's keys fall into two parts, the sinks and the last ``window_size`` tokens. Each part is one call of
FlashAttention (arXiv 2307.08691), which has sliding windows built in; the parts are joined by their log-sum-exps.
Queries that are sinks themselves are a call of their own.
Backward, each part is given the joint output and the joint log-sum-exp: then its probabilities are those of the joint
softmax.

Dimensions as in ``window_attention``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import forms, pieces
from .between import Between
from .join import join

Part = tuple[Tensor, Tensor, Tensor, int | None]
"""Queries, keys, values, ``(b, t, h, d)`` each; how many tokens back a query sees, itself included, None for all."""


def attend_beside(q: Float[Tensor, "b h t d"], part: Between, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to keys that are seen for a while, ``(b, t, h, d)``, and its log-sum-exp, ``(b, h, t)``."""
    from . import triton_between

    index, count = part.in_chunks(q.shape[2], triton_between.CHUNK)
    return triton_between.attend(q, part.k, part.v, part.first, part.last, index, count, scale)


def flash_window_attention(
    q: Float[Tensor, "b h t d"],
    q_sinks: Float[Tensor, "b h t d"] | None,
    sink_k: Float[Tensor, "b g s d"] | None,
    sink_v: Float[Tensor, "b g s d"] | None,
    context_k: Float[Tensor, "b g c d"],
    context_v: Float[Tensor, "b g c d"],
    *,
    window_size: int,
    head: int,
    own: int,
    scale: float,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> Float[Tensor, "b h t d"]:
    """Every query sees the sinks up to itself, and of the other tokens the last ``window_size`` up to its own.

    Arguments as of ``window_attention``, except that all queries face the sinks as ``q_sinks``. The first ``head``
    queries are sinks themselves, as are the first ``own`` columns of the context. ``beside`` is attention to further
    keys and its log-sum-exp, as ``attend_beside`` returns them.
    """
    columns = q.shape[2] + window_size - 1  # no query sees further back
    if sink_k is not None and sink_v is not None and not head:
        own, k, v = 0, *(u[:, :, own:][:, :, -columns:] for u in (context_k, context_v))
        if forms.is_cut_in_pieces(q, k, window_size):
            facing = q if q_sinks is None else q_sinks
            return _with(beside, pieces.attend_in_pieces(q, facing, sink_k, sink_v, k, v, scale, window_size))
        context_k, context_v = k, v
    begins = sink_k is None and q_sinks is None and context_k.shape[2] == q.shape[2]
    if begins and forms.is_cut_in_pieces(q, context_k[:, :, own:], window_size):
        return _with(beside, pieces.cudnn(q, context_k, context_v, True, scale))
    tensors = [None if u is None else u.transpose(1, 2) for u in (q, q_sinks, sink_k, sink_v, context_k, context_v)]
    cut = _Cut(window_size, head, own, scale)
    if beside:
        return _with(beside, _joint(cut, *tensors)[0])  # type: ignore[arg-type]
    out: Tensor = _JointAttention.apply(cut, *tensors)
    return out.transpose(1, 2)


def _with(beside: Sequence[tuple[Tensor, Tensor]], attended: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the window, ``(b, t, h, d)``, and over what is beside it, ``(b, h, t, d)``."""
    outs, lses = zip(attended, *beside, strict=True)
    return join(outs, lses)[0].transpose(1, 2)


class _Cut(NamedTuple):
    """How the queries and keys of one call fall into parts, see ``flash_window_attention``."""

    window_size: int
    head: int
    own: int
    scale: float

    def parts(self, q: Tensor, facing: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        """The queries that are sinks among the sinks; the others over the window and, if there are any, the sinks."""
        head, own = self.head, self.own
        parts: list[Part] = []
        if head:
            parts.append((q[:, :head], sink_k, sink_v, sink_k.shape[1]))
        if head < q.shape[1]:
            parts.append((q[:, head:], k[:, own:], v[:, own:], self.window_size))
            if sink_k.shape[1]:
                parts.append((facing[:, head:], sink_k, sink_v, None))
        return parts


class _JointAttention(torch.autograd.Function):
    """One softmax over the window and, if there are any, the sinks.

    All slices are taken in here, so that each gradient is written once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cut: _Cut,
        q: Tensor,
        q_sinks: Tensor | None,
        sink_k: Tensor | None,
        sink_v: Tensor | None,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        ctx.cut, ctx.turned, ctx.inside = cut, q_sinks is not None, sink_k is None
        (out, _), saved = _joint(cut, q, q_sinks, sink_k, sink_v, k, v)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cut, saved = ctx.cut, ctx.saved_tensors
        tensors, rest = saved[:6], saved[6:]
        q, _, sink_k, sink_v, k, v = tensors
        parts = cut.parts(*tensors)
        extras, joint = rest[: 2 * len(parts)], rest[2 * len(parts) :]
        found = []
        for number, part in enumerate(parts):
            extra = extras[2 * number : 2 * number + 2]
            first = cut.head and not number
            piece = slice(0, cut.head) if first else slice(cut.head, None)
            out, lse = joint[:2] if first else joint[-2:]
            found.append(_flash_backward(grad[:, piece], part, out, lse, extra, cut.scale))
        head = [found.pop(0)] if cut.head else []
        window = found[:1] or [tuple(u[:, :0] for u in (q, k, v))]
        dq = [u[0] for u in head] + [u[0] for u in window]
        turned = None
        if found[1:] and ctx.turned:
            turned = torch.cat((q.new_zeros(q[:, : cut.head].shape), found[1][0]), dim=1)
        elif found[1:]:
            dq[-1] = dq[-1] + found[1][0]
        sinks = []  # of their keys and values, from both sides
        for i, u in ((1, sink_k), (2, sink_v)):
            given = [grads[i] for grads in (*head, *found[1:])]
            sinks.append(sum(given[1:], given[0]) if given else torch.zeros_like(u))
        if ctx.inside:
            dk, dv = (torch.cat((sink, window[0][i]), dim=1) for i, sink in ((1, sinks[0]), (2, sinks[1])))
            return None, torch.cat(dq, dim=1), turned, None, None, dk, dv
        dk, dv = (
            torch.cat((u.new_zeros(u[:, : cut.own].shape), window[0][i]), dim=1) if cut.own else window[0][i]
            for i, u in ((1, k), (2, v))
        )
        return None, torch.cat(dq, dim=1) if len(dq) > 1 else dq[0], turned, *sinks, dk, dv


def _joint(
    cut: _Cut, q: Tensor, q_sinks: Tensor | None, sink_k: Tensor | None, sink_v: Tensor | None, k: Tensor, v: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """The joint attention with its log-sum-exp, and what the backward pass needs."""
    tensors = (q, q if q_sinks is None else q_sinks, *_sinks(cut, sink_k, sink_v, k, v), k, v)
    outs, lses, extras = zip(*(_flash(part, cut.scale) for part in cut.parts(*tensors)), strict=True)
    split = 1 if cut.head else 0
    joint = [(outs[0], lses[0])] if split else []
    if len(outs) > split:
        joint.append(join(outs[split:], lses[split:]))
    saved = (*tensors, *(u for extra in extras for u in extra), *(u for piece in joint for u in piece))
    if len(joint) == 1:
        return joint[0], saved
    return (torch.cat([out for out, _ in joint], dim=1), torch.cat([lse for _, lse in joint], dim=2)), saved


def _sinks(cut: _Cut, sink_k: Tensor | None, sink_v: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if sink_k is None or sink_v is None:
        return k[:, : cut.own], v[:, : cut.own]
    return sink_k, sink_v


def _flash(part: Part, scale: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    q, k, v, back = part
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, back is not None, False, scale=scale, **_sides(back)
    )
    return found[0], found[1], found[2:4]


def _flash_backward(
    grad: Tensor, part: Part, out: Tensor, lse: Tensor, extra: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, back = part
    return flash_backward(grad, q, k, v, out, lse, list(extra), back, scale)  # type: ignore[no-any-return]


@torch.library.custom_op("ahn_layers::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: list[Tensor], back: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of FlashAttention, as PyTorch has it, by queries, keys and values.

    An operation of its own, since PyTorch's reads the log-sum-exp as if it had no gaps between its rows, and a compiler
    may leave some. Shapes as in ``Part``; ``extra`` is the state of the random generator, which nothing draws from.
    """
    grad, out, lse = (u.contiguous() for u in (grad, out, lse))
    grads = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, back is not None, *extra, scale=scale,
        **_sides(back),
    )  # fmt: skip
    dq, dk, dv = (u.contiguous() for u in grads)
    return dq, dk, dv


@flash_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _sides(back: int | None) -> dict[str, int]:
    return {} if back is None else {"window_size_left": back - 1, "window_size_right": 0}
