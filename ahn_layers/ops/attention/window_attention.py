"""Softmax attention over sinks and a sliding window, in memory linear in the length.

Dimensions: b batch, h query heads, g key/value heads, t queries, s sinks, c context columns, d key size, e value size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import forms
from .between import Between
from .flash_attention import attend_beside, flash_window_attention

_BLOCK_SCORES = 1 << 27
"""Upper bound on the scores ``b * h * block * keys`` of one query block (512 MiB in float32, if materialised)."""


def masked_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g c d"],
    v: Float[Tensor, "b g c e"],
    visible: Bool[Tensor, "*m c"] | Float[Tensor, "*m c"] | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    q_sinks: Float[Tensor, "b h t d"] | None = None,
    num_sinks: int = 0,
    q_kept: Float[Tensor, "b h t d"] | None = None,
    num_kept: int = 0,
    null_logits: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h t e"]:
    """Attention under a boolean mask, with grouped key/value heads and, on request, capped or re-positioned logits.

    Args:
        q: queries.
        k: keys; ``h`` must be a multiple of ``g``.
        v: values.
        visible: True where a query may see a key, or what is added to its logit; broadcastable to ``(b, h, t, c)``, or
            of ``g`` heads. None shows everything.
        scale: logit factor, default ``d ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        q_sinks: queries to use against the first ``num_sinks`` keys instead of ``q``.
        num_sinks: how many leading keys are sinks.
        q_kept: queries to use against the last ``num_kept`` keys instead of ``q``.
        num_kept: how many of the last keys an eviction keeps.
        null_logits: one more logit of each head, which takes its part of the softmax and has no value.

    Returns:
        The attention output, in the dtype of ``q``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first, last = (0 if q_sinks is None else num_sinks), k.shape[2] - (0 if q_kept is None else num_kept)
    facing = [(q_sinks, 0, first), (q, first, last), (q_kept, last, k.shape[2])]
    views = [(u, a, b) for u, a, b in facing if u is not None]
    if visible is not None and visible.ndim == 4 and 1 < visible.shape[1] < q.shape[1]:
        visible = visible.repeat_interleave(q.shape[1] // visible.shape[1], dim=1)
    # a mask that learns goes the plain way: the backward pass of the fused kernels refuses some shapes of it
    learns = visible is not None and visible.dtype != torch.bool
    if softcap is None and null_logits is None and not learns and (len(views) == 1 or q.shape[2] > 1):
        size = v.shape[-1]
        if len(views) > 1:
            # one product for all kinds of keys: [q_sinks, q, ...] with [k, 0, ...] at the sinks, [0, k, ...] elsewhere
            place = torch.arange(k.shape[2], device=k.device).unsqueeze(-1)
            q = torch.cat([u for u, _, _ in views], dim=-1)
            k = torch.cat([k * ((place >= a) & (place < b)) for _, a, b in views], dim=-1)
            v = F.pad(v, (0, max(0, k.shape[-1] - size)))
        return _grouped_attention(q, k, v, visible, scale)[..., :size]
    b, h, t, _ = q.shape

    def by_group(u: Tensor) -> Tensor:  # the queries of a key/value head side by side: nothing is repeated
        return u.reshape(b, k.shape[1], -1, u.shape[-1])

    logits = torch.cat([by_group(u * scale) @ k[:, :, i:j].mT for u, i, j in views], dim=-1)
    logits = logits.reshape(b, h, t, -1).to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits + added(visible, logits.dtype)
    if null_logits is not None:
        logits = torch.cat((logits, null_logits.to(logits.dtype).view(1, h, 1, 1).expand(b, h, t, 1)), dim=-1)
    weights = logits.softmax(dim=-1).to(v.dtype)[..., : k.shape[2]]
    return (by_group(weights) @ v).reshape(b, h, t, -1)


def together(*visible: Tensor) -> Tensor:
    """Masks of several kinds of keys, one beside the other: boolean if all are, else as they are added to logits."""
    if all(u.dtype == torch.bool for u in visible):
        return torch.cat(visible, dim=3)
    return torch.cat([added(u, torch.float32) for u in visible], dim=3)


def added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to logits."""
    if visible.dtype != torch.bool:
        return visible.to(torch.promote_types(visible.dtype, dtype))
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention for grouped heads, in the form that has a fused kernel on the device."""
    repeats = q.shape[1] // k.shape[1]
    if repeats == 1 or visible is None or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=repeats > 1)
    b, h, t, d = q.shape  # fused kernels take a mask or grouped heads: put the queries of a group side by side
    together = q.reshape(b, k.shape[1], repeats * t, d)
    visible = visible.expand(-1, -1, t, -1)
    if visible.shape[1] == h > 1:
        visible = visible.reshape(len(visible), k.shape[1], repeats * t, -1)
    else:
        visible = visible.repeat(1, 1, repeats, 1)
    return F.scaled_dot_product_attention(together, k, v, attn_mask=visible, scale=scale).reshape(b, h, t, -1)


def window_attention(
    q: Float[Tensor, "b h t d"],
    sink_k: Float[Tensor, "b g s d"] | None,
    sink_v: Float[Tensor, "b g s e"] | None,
    context_k: Float[Tensor, "b g c d"],
    context_v: Float[Tensor, "b g c e"],
    rank: Int[Tensor, "*b t"],
    *,
    window_size: int,
    num_sinks: int,
    scale: float | None = None,
    softcap: float | None = None,
    q_sinks: Float[Tensor, "b h far d"] | None = None,
    first_rank: int | None = None,
    beside: Sequence[Between] = (),
    q_kept: Float[Tensor, "b h t d"] | None = None,
    null_logits: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h t e"]:
    """Every query sees the sinks up to itself and the last ``window_size`` tokens, itself included.

    The context is contiguous in rank and its last ``t`` columns are the queries' own tokens, so query ``i`` has
    column ``c - t + i``. Queries go block by block against the sinks and the slice of the context they can see; the
    largest tensor is one block of scores, and in training each block is recomputed in the backward pass, so memory
    grows linearly with the length in both directions. In half precision on a GPU, rows of equal rank go through fused
    kernels instead.

    Args:
        q: queries, already rotated.
        sink_k: keys of the tokens of rank 0 to s - 1; None if the context begins with rank 0, and so with the sinks.
        sink_v: their values.
        context_k: keys of the window before the first query, followed by the queries' own keys.
        context_v: their values.
        rank: rank of each query's token, shared ``(t,)`` or per row ``(b, t)``.
        window_size: tokens a query sees besides the sinks.
        num_sinks: ranks below this are sinks and are never seen through the context.
        scale: logit factor, default ``d ** -0.5``.
        softcap: see ``masked_attention``.
        q_sinks: queries to use against the sinks, for the last ``far`` queries.
        first_rank: rank of the first query, if it is the same in every row and known.
        beside: what else is in the softmax.
        q_kept: queries to use against the last of what is beside, instead of ``q``.
        null_logits: see ``masked_attention``.

    Returns:
        The attention output, in the dtype of ``q``.
    """
    past = context_k.shape[2] - q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = softcap is not None or null_logits is not None
    fused = not plain and forms.is_fused(q, context_v)
    if first_rank is not None and fused and all(map(forms.is_fused_beside, beside)):
        far = 0 if q_sinks is None else q_sinks.shape[2]
        facing = None if q_sinks is None else torch.cat((q[:, :, : q.shape[2] - far], q_sinks), dim=2)
        if sink_k is not None and sink_v is not None:
            sink_k, sink_v = (u[:, :, : first_rank + q.shape[2]] for u in (sink_k, sink_v))
        return flash_window_attention(
            q,
            facing,
            sink_k,
            sink_v,
            context_k,
            context_v,
            window_size=window_size,
            head=min(q.shape[2], max(0, num_sinks - first_rank)),
            own=min(context_k.shape[2], max(0, num_sinks - (first_rank - past))),
            scale=scale,
            beside=[attend_beside(q if q_kept is None else q_kept, part, scale) for part in beside],
        )
    if sink_k is None or sink_v is None:
        sink_k, sink_v = context_k[:, :, :num_sinks], context_v[:, :, :num_sinks]
    options: dict[str, Any] = {"window_size": window_size, "num_sinks": num_sinks, "scale": scale}
    options |= {"softcap": softcap, "null_logits": null_logits}
    return _blockwise(q, sink_k, sink_v, context_k, context_v, rank, q_sinks, beside, q_kept, **options)


def add_to_tail(out: Float[Tensor, "b h t e"], tail: Float[Tensor, "b h u e"]) -> Float[Tensor, "b h t e"]:
    """``tail`` added to the last tokens of ``out``."""
    first = out.shape[2] - tail.shape[2]
    if first == 0:
        return out + tail
    if torch.compiler.is_compiling():  # a compiler writes once by itself
        return out + F.pad(tail, (0, 0, first, 0))
    return _AddToTail.apply(out, tail)  # type: ignore[no-any-return,no-untyped-call]


class _AddToTail(torch.autograd.Function):
    """Written once and in the layout of ``out``; to autograd slices would be copies."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, tail: Tensor) -> Tensor:
        ctx.size = tail.shape[2]
        whole, first = torch.empty_like(out), out.shape[2] - ctx.size
        whole[:, :, :first] = out[:, :, :first]
        torch.add(out[:, :, first:], tail, out=whole[:, :, first:])
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad[:, :, -ctx.size :]


def _blockwise(
    q: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    rank: Tensor,
    q_sinks: Tensor | None = None,
    beside: Sequence[Between] = (),
    q_kept: Tensor | None = None,
    *,
    window_size: int,
    num_sinks: int,
    scale: float,
    softcap: float | None = None,
    null_logits: Tensor | None = None,
) -> Tensor:
    """``window_attention`` in plain PyTorch: under a mask, one block of queries at a time."""
    past = context_k.shape[2] - q.shape[2]
    near = q.shape[2] - (0 if q_sinks is None else q_sinks.shape[2])
    sinks = sink_k.shape[2]
    sink_rank = torch.arange(sinks, device=q.device)
    step = _block_size(q, sinks + window_size)
    starts = [*range(0, near, step), *range(near, q.shape[2], step)]

    def block(start: int, stop: int) -> Tensor:
        low = max(0, start + past - window_size + 1)
        columns = torch.arange(low, stop + past, device=q.device)
        queries = rank[..., start:stop, None]
        keys = rank[..., :1, None] + (columns - past)
        seen = (keys >= num_sinks) & (keys <= queries) & (keys > queries - window_size)
        visible = torch.cat((sink_rank <= queries, seen), dim=-1)
        visible = visible.view(-1, 1, *visible.shape[-2:])
        others = [part.of(start, stop) for part in beside]
        if others:
            visible = together(visible.expand(len(q), context_k.shape[1], -1, -1), *(u[2] for u in others))
        return masked_attention(
            q[:, :, start:stop],
            torch.cat((sink_k, context_k[:, :, low : stop + past], *(u[0] for u in others)), dim=2),
            torch.cat((sink_v, context_v[:, :, low : stop + past], *(u[1] for u in others)), dim=2),
            visible,
            scale=scale,
            softcap=softcap,
            q_sinks=None if q_sinks is None or start < near else q_sinks[:, :, start - near : stop - near],
            num_sinks=sinks,
            q_kept=None if q_kept is None else q_kept[:, :, start:stop],
            num_kept=0 if q_kept is None else others[-1][0].shape[2],
            null_logits=null_logits,
        )

    ends = [*starts[1:], q.shape[2]]
    needs_grad = torch.is_grad_enabled() and any(
        u is not None and u.requires_grad for u in (q, context_k, context_v, null_logits)
    )
    if needs_grad and len(starts) > 1:
        blocks = [
            checkpoint(block, a, b, use_reentrant=False, preserve_rng_state=False)
            for a, b in zip(starts, ends, strict=True)
        ]
    else:
        blocks = [block(a, b) for a, b in zip(starts, ends, strict=True)]
    return torch.cat(blocks, dim=2)


def _block_size(q: Tensor, seen: int) -> int:
    """Half of what a query sees (few wasted scores) within limits, and few enough that scores stay bounded."""
    affordable = _BLOCK_SCORES // (q.shape[0] * q.shape[1] * seen) // 16 * 16
    shortest = 1024 if q.is_cuda else 128  # launches cost more than wasted scores
    return max(16, min(affordable, max(shortest, min(seen // 2, 1024))))
