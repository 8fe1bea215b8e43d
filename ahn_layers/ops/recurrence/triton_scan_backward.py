"""The chunked scans in Triton, backward; the kernels are in ``triton_scan_gradients``.

What the first two steps of the forward pass made is kept: the states before the chunks and, for each token, what it
writes, ``u``, ``w`` and its row of ``T``. Then the same three steps the other way: what the readings ask of each
written value, the gradient of the state from the last chunk to the first, and side by side the gradients of queries,
keys, values and gates. The gradient of the decay since the start of the chunk is ``q . dq - k . dk``
(arXiv 2312.06635, section 4), with what else holds it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import Any

import torch
import triton
from torch import Tensor

from ..triton_forms import operator
from .triton_scan import CHUNK, Scan
from .triton_scan_gradients import _ask_of_written, _grads_between, _grads_of_chunks, _grads_of_system


@operator("ahn_layers::chunked_scan_backward")
def chunked_scan_backward(
    grad: Tensor, grad_after: Tensor, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    beta: Tensor | None, kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of ``trained_scan``, from those of its first two results: one per tensor that was given, in order."""
    scan = Scan(state, q, k, v, g, beta)
    before, written, u, w, inverse = kept
    grad = grad.to(k.dtype).contiguous()
    (d, e), rows, chunks, padded = state.shape[-2:], scan.rows, scan.chunks, scan.chunks * CHUNK
    q_strides, k_strides, v_strides = (u.stride()[:3] for u in (scan.q, scan.k, scan.v))
    shares: dict[str, Any] = {"K_SHARE": scan.k_share, **scan.sizes}
    wide = scan.wide

    asked = scan.empty(padded, e)
    _ask_of_written[(chunks, rows)](
        scan.q, scan.k, scan.decay, grad, asked, scan.length, chunks, scan.states, *q_strides, *k_strides,
        R=scan.repeats, E_PAD=scan.e_pad, num_warps=wide, num_stages=1, **shares,
    )  # fmt: skip
    grad_written, grad_state = scan.empty(padded, e), scan.empty(chunks, d, e)
    grad_before, tile = torch.empty_like(scan.state), min(scan.e_pad, 32)
    _grads_between[(triton.cdiv(e, tile), rows)](
        grad_after.contiguous(), scan.q, scan.k, scan.decay, grad if beta is None else w, grad, asked, grad_written,
        grad_state, grad_before, scan.length, chunks, scan.states, *q_strides, *k_strides,
        R=scan.repeats, TILE=tile, DELTA=beta is not None, num_warps=4, num_stages=scan.stages, **shares,
    )  # fmt: skip
    d_tile = min(shares["D_PAD"], 64)
    parts = triton.cdiv(d, d_tile)
    dq, dk = q.new_empty(q.shape), scan.empty(padded, d, dtype=torch.float32)
    dw = dk if beta is None else scan.empty(padded, d)
    dtotal = scan.k.new_empty(parts + (beta is not None), rows, padded, dtype=torch.float32)
    _grads_of_chunks[(chunks, rows, parts)](
        scan.q, scan.k, scan.decay, before, written, grad, grad_state, grad_written, dq, dk, dw, dtotal,
        scan.length, chunks, scan.states, *q_strides, *k_strides, R=scan.repeats, D_TILE=d_tile, E_PAD=scan.e_pad,
        E_TILE=min(scan.e_pad, 32 if scan.exact else 64), DELTA=beta is not None, num_warps=4, num_stages=1,
        **{name: value for name, value in shares.items() if name != "D_PAD"},
    )  # fmt: skip
    dv, dbeta = grad_written, None
    if beta is not None:
        dv, dbeta = asked, scan.empty(padded, dtype=torch.float32)
        _grads_of_system[(chunks, rows)](
            scan.k, scan.v, scan.decay, scan.strength, u, w, inverse, grad_written, dw, dk, dv, dbeta, dtotal[-1],
            scan.length, scan.states, *k_strides, *v_strides, V_SHARE=scan.v_share, E_PAD=scan.e_pad,
            num_warps=wide, num_stages=1, **shares,
        )  # fmt: skip

    def gather(u: Tensor, heads: int, like: Tensor) -> Tensor:
        """Without the padding, states of one head summed."""
        u = u.view(scan.b, heads, -1, padded, u.shape[-1])[:, :, :, : scan.length]
        return (u.squeeze(2) if u.shape[2] == 1 else u.sum(2, dtype=torch.float32)).to(like.dtype).contiguous()

    grads = [grad_before, dq, gather(dk, k.shape[1], k), gather(dv, v.shape[1], v)]
    if g is not None:
        sums = dtotal.sum(0).view(*g.shape[:2], chunks, CHUNK)
        grads.append(sums.flip(-1).cumsum(-1).flip(-1).flatten(2)[..., : scan.length].contiguous())
    if dbeta is not None:
        grads.append(dbeta.view(scan.b, scan.states, padded)[..., : scan.length].contiguous())
    return grads


@chunked_scan_backward.register_fake
def _(
    grad: Tensor, grad_after: Tensor, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    beta: Tensor | None, kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    given = [u for u in (state, q, k, v, g, beta) if u is not None]
    return [u.new_empty(u.shape) for u in given]


@operator("ahn_layers::trained_scan")
def trained_scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``chunked_scan`` with gradients: its two results, then what is kept for them.

    Kept are, in the dtype of the products, the states before the chunks ``(B S, n, D, E)`` and what each token writes;
    of the delta rule also ``u``, ``w`` and the rows of ``T``: ``(B S, n CHUNK, E)``, ``(B S, n CHUNK, D)`` and
    ``(B S, n CHUNK, CHUNK)``, else these are empty.
    """
    return Scan(state, q, k, v, g, beta).run_and_keep()  # type: ignore[return-value]


@trained_scan.register_fake
def _(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (d, e), rows = state.shape[-2:], state.shape[0] * state.shape[1]
    chunks = torch.sym_max(2, -(-q.shape[2] // CHUNK))
    sizes = [(chunks, d, e), (chunks * CHUNK, e)]
    kept = [k.new_empty(rows, *size) for size in sizes]
    for size in (e, d, CHUNK):
        kept.append(k.new_empty(0) if beta is None else k.new_empty(rows, chunks * CHUNK, size))
    return k.new_empty(*q.shape[:3], e), torch.empty_like(state), *kept  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.set_materialize_grads(False)  # nobody asks for the gradients of what is kept


def _backward(ctx: Any, grad: Tensor | None, grad_after: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, kept = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    state, q, k, v = inputs[:4]
    grad = k.new_zeros(*q.shape[:3], v.shape[-1]) if grad is None else grad
    grad_after = torch.zeros_like(state) if grad_after is None else grad_after
    grads = iter(chunked_scan_backward(grad, grad_after, *inputs, kept))
    return tuple(None if u is None else next(grads) for u in inputs)


trained_scan.register_autograd(_backward, setup_context=_save)
