"""Triton kernels for the chunked scans, backward.

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
import triton.language as tl
from torch import Tensor

from ..triton_forms import on_its_gpu
from .triton_scan import CHUNK, Scan, load_rows


@triton.jit
def _ask_of_written(
    q_ptr, k_ptr, total_ptr, grad_ptr, asked_ptr, length, chunks, S, q_b, q_h, q_t, k_b, k_h, k_t,
    K_SHARE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, C: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradient of what tokens write, as far as queries of their own chunk read it."""
    n, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, s, c, e = row // S, row % S, tl.arange(0, C), tl.arange(0, E_PAD)
    i, j = c[:, None], c[None, :]
    k = load_rows(k_ptr + b * k_b + s // K_SHARE * k_h, n * C, length, k_t, C, D, D_PAD)
    at = (row * chunks + n) * C + c
    total = tl.zeros((C,), tl.float32)
    if DECAYS:
        total = tl.load(total_ptr + at)
    between = tl.where(i <= j, tl.exp(tl.where(i <= j, total[None, :] - total[:, None], 0.0)), 0.0)
    asked = tl.zeros((C, E_PAD), tl.float32)
    for r in range(R):
        head = s * R + r
        q = load_rows(q_ptr + b * q_b + head * q_h, n * C, length, q_t, C, D, D_PAD).to(k.dtype)
        grad = load_rows(grad_ptr + (b * S * R + head) * length * E, n * C, length, E, C, E, E_PAD)
        scores = tl.dot(k, tl.trans(q), input_precision=EXACT) * between
        asked += tl.dot(scores.to(k.dtype), grad, input_precision=EXACT)
    tl.store(asked_ptr + at[:, None] * E + e[None, :], asked.to(k.dtype), mask=e[None, :] < E)


@triton.jit
def _grads_between(
    grad_after_ptr, q_ptr, k_ptr, total_ptr, w_ptr, grad_ptr, asked_ptr, grad_written_ptr, grad_state_ptr,
    grad_before_ptr, length, chunks, S, q_b, q_h, q_t, k_b, k_h, k_t,
    K_SHARE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, C: tl.constexpr, DECAYS: tl.constexpr, DELTA: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after every chunk and before the first, and of what every token writes."""
    row = tl.program_id(1).to(tl.int64)
    b, s, edge = row // S, row % S, tl.program_id(0) * TILE
    c, d, e = tl.arange(0, C), tl.arange(0, D_PAD), edge + tl.arange(0, TILE)
    inside = (d[:, None] < D) & (e[None, :] < E)
    tile = d[:, None] * E + e[None, :]
    state = tl.load(grad_after_ptr + row * D * E + tile, mask=inside, other=0.0)
    k_ptr += b * k_b + s // K_SHARE * k_h
    for step in range(0, chunks):
        n = chunks - 1 - step
        k = load_rows(k_ptr, n * C, length, k_t, C, D, D_PAD)
        operand = state.to(k.dtype)
        tl.store(grad_state_ptr + (row * chunks + n) * D * E + tile, operand, mask=inside)
        at = (row * chunks + n) * C + c
        cells = at[:, None] * E + e[None, :]
        written = tl.dot(k, operand, input_precision=EXACT)
        since = tl.full((C,), 1.0, tl.float32)
        if DECAYS:
            total = tl.load(total_ptr + at)
            last = tl.load(total_ptr + (row * chunks + n) * C + C - 1)
            written *= tl.exp(last - total)[:, None]
            since = tl.exp(total)
            state *= tl.exp(last)
        written += tl.load(asked_ptr + cells, mask=e[None, :] < E, other=0.0).to(tl.float32)
        tl.store(grad_written_ptr + cells, written.to(k.dtype), mask=e[None, :] < E)
        for r in range(R):
            head = s * R + r
            q = load_rows(q_ptr + b * q_b + head * q_h, n * C, length, q_t, C, D, D_PAD).to(k.dtype)
            grads = grad_ptr + (b * S * R + head) * length * E + edge
            grad = load_rows(grads, n * C, length, E, C, E - edge, TILE).to(tl.float32) * since[:, None]
            state += tl.dot(tl.trans(q), grad.to(k.dtype), input_precision=EXACT)
        if DELTA:
            w = tl.load(w_ptr + at[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
            state -= tl.dot(tl.trans(w), written.to(k.dtype), input_precision=EXACT)
    tl.store(grad_before_ptr + row * D * E + tile, state, mask=inside)


@triton.jit
def _grads_of_chunks(
    q_ptr, k_ptr, total_ptr, before_ptr, written_ptr, grad_ptr, grad_state_ptr, grad_written_ptr,
    dq_ptr, dk_ptr, dw_ptr, dtotal_ptr, length, chunks, S, q_b, q_h, q_t, k_b, k_h, k_t,
    K_SHARE: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, E_TILE: tl.constexpr, C: tl.constexpr, DECAYS: tl.constexpr, DELTA: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, of keys outside the system, of ``w`` and of the decays, for some of the key channels."""
    n, row, first_d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * D_TILE
    b, s, c, d = row // S, row % S, tl.arange(0, C), first_d + tl.arange(0, D_TILE)
    i, j, t = c[:, None], c[None, :], n * C + c
    at = (row * chunks + n) * C + c
    here, cells = (t[:, None] < length) & (d[None, :] < D), at[:, None] * D + d[None, :]
    k = load_rows(k_ptr + b * k_b + s // K_SHARE * k_h + first_d, n * C, length, k_t, C, D - first_d, D_TILE)
    total, last = tl.zeros((C,), tl.float32), 0.0
    if DECAYS:
        total = tl.load(total_ptr + at)
        last = tl.load(total_ptr + (row * chunks + n) * C + C - 1)
    between = tl.where(i >= j, tl.exp(tl.where(i >= j, total[:, None] - total[None, :], 0.0)), 0.0)
    turned = tl.where(i <= j, tl.exp(tl.where(i <= j, total[None, :] - total[:, None], 0.0)), 0.0)
    tail, dw = tl.zeros((C, D_TILE), tl.float32), tl.zeros((C, D_TILE), tl.float32)
    carried = 0.0
    for first_e in range(0, E_PAD, E_TILE):
        e = first_e + tl.arange(0, E_TILE)
        inside = (d[:, None] < D) & (e[None, :] < E)
        states = (row * chunks + n) * D * E + d[:, None] * E + e[None, :]
        values, kept = at[:, None] * E + e[None, :], e[None, :] < E
        before = tl.load(before_ptr + states, mask=inside, other=0.0)
        grad_state = tl.load(grad_state_ptr + states, mask=inside, other=0.0)
        written = tl.load(written_ptr + values, mask=kept, other=0.0)
        tail += tl.dot(written, tl.trans(grad_state), input_precision=EXACT)
        if DELTA:
            grad_written = tl.load(grad_written_ptr + values, mask=kept, other=0.0)
            dw -= tl.dot(grad_written, tl.trans(before), input_precision=EXACT)
        carried += tl.sum(before.to(tl.float32) * grad_state.to(tl.float32))
    tail *= tl.exp(last - total)[:, None]
    dk = tail
    dtotal = tl.zeros((C,), tl.float32)
    for r in range(R):
        head = s * R + r
        q = load_rows(q_ptr + b * q_b + head * q_h + first_d, n * C, length, q_t, C, D - first_d, D_TILE).to(k.dtype)
        grads = grad_ptr + (b * S * R + head) * length * E
        dq = tl.zeros((C, D_TILE), tl.float32)
        scores, scores_turned = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        for first_e in range(0, E_PAD, E_TILE):
            e = first_e + tl.arange(0, E_TILE)
            grad = load_rows(grads + first_e, n * C, length, E, C, E - first_e, E_TILE)
            written = tl.load(written_ptr + at[:, None] * E + e[None, :], mask=e[None, :] < E, other=0.0)
            states = (row * chunks + n) * D * E + d[:, None] * E + e[None, :]
            before = tl.load(before_ptr + states, mask=(d[:, None] < D) & (e[None, :] < E), other=0.0)
            dq += tl.dot(grad, tl.trans(before), input_precision=EXACT)
            scores += tl.dot(grad, tl.trans(written), input_precision=EXACT)
            scores_turned += tl.dot(written, tl.trans(grad), input_precision=EXACT)
        dq *= tl.exp(total)[:, None]
        dq += tl.dot((scores * between).to(k.dtype), k, input_precision=EXACT)
        dk += tl.dot((scores_turned * turned).to(k.dtype), q, input_precision=EXACT)
        dtotal += tl.sum(q.to(tl.float32) * dq, 1)
        out = ((b * S * R + head) * length + t)[:, None] * D + d[None, :]
        tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=here)
    tl.store(dk_ptr + cells, dk, mask=d[None, :] < D)
    if DELTA:
        tl.store(dw_ptr + cells, dw.to(k.dtype), mask=d[None, :] < D)
    if DECAYS:
        keys = k.to(tl.float32)
        end = carried * tl.exp(last) + tl.sum(tail * keys)
        dtotal += tl.where(c == C - 1, end, 0.0) - tl.sum(dk * keys, 1)
        tl.store(dtotal_ptr + tl.program_id(2).to(tl.int64) * tl.num_programs(1) * chunks * C + at, dtotal)


@triton.jit
def _grads_of_system(
    k_ptr, v_ptr, total_ptr, beta_ptr, u_ptr, w_ptr, inverse_ptr, grad_written_ptr, dw_ptr,
    dk_ptr, dv_ptr, dbeta_ptr, dtotal_ptr, length, S, k_b, k_h, k_t, v_b, v_h, v_t,
    K_SHARE: tl.constexpr, V_SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, C: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients through ``u = T (beta v)`` and ``w = T (beta exp(total) k)``.

    With ``x = T^T du`` and ``y = T^T dw``, that of the system ``A`` is ``-(x u^T + y w^T)`` below the diagonal.
    """
    n, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, s, chunks = row // S, row % S, tl.num_programs(0)
    c, d, e = tl.arange(0, C), tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    i, j = c[:, None], c[None, :]
    at = (row * chunks + n) * C + c
    keys, values = at[:, None] * D + d[None, :], at[:, None] * E + e[None, :]
    k = load_rows(k_ptr + b * k_b + s // K_SHARE * k_h, n * C, length, k_t, C, D, D_PAD)
    v = load_rows(v_ptr + b * v_b + s // V_SHARE * v_h, n * C, length, v_t, C, E, E_PAD)
    beta = tl.load(beta_ptr + at)
    total = tl.zeros((C,), tl.float32)
    if DECAYS:
        total = tl.load(total_ptr + at)
    across = tl.load(inverse_ptr + at[None, :] * C + i)  # T^T
    dw = tl.load(dw_ptr + keys, mask=d[None, :] < D, other=0.0)
    y = tl.dot(across, dw, input_precision=EXACT)
    weight = tl.exp(total)
    along = tl.sum(y * k.to(tl.float32), 1)
    dbeta, dtotal = along * weight, along * weight * beta
    dk = y * (weight * beta)[:, None]
    y = y.to(k.dtype)
    w = tl.load(w_ptr + keys, mask=d[None, :] < D, other=0.0)
    system, turned = tl.dot(y, tl.trans(w), input_precision=EXACT), tl.dot(w, tl.trans(y), input_precision=EXACT)
    x = tl.dot(across, tl.load(grad_written_ptr + values, mask=e[None, :] < E, other=0.0), input_precision=EXACT)
    dbeta += tl.sum(x * v.to(tl.float32), 1)
    tl.store(dv_ptr + values, (x * beta[:, None]).to(dv_ptr.dtype.element_ty), mask=e[None, :] < E)
    x = x.to(k.dtype)
    u = tl.load(u_ptr + values, mask=e[None, :] < E, other=0.0)
    system += tl.dot(x, tl.trans(u), input_precision=EXACT)
    turned += tl.dot(u, tl.trans(x), input_precision=EXACT)
    decay = tl.exp(tl.where(i > j, total[:, None] - total[None, :], 0.0))
    system = tl.where(i > j, -system * decay, 0.0)
    decay = tl.exp(tl.where(i < j, total[None, :] - total[:, None], 0.0))
    turned = tl.where(i < j, -turned * decay * beta[None, :], 0.0)
    product = tl.dot(k, tl.trans(k), input_precision=EXACT)
    dbeta += tl.sum(system * product, 1)
    system *= beta[:, None]
    dk += tl.dot(system.to(k.dtype), k, input_precision=EXACT)
    dk += tl.dot(turned.to(k.dtype), k, input_precision=EXACT)
    dk += tl.load(dk_ptr + keys, mask=d[None, :] < D, other=0.0)
    tl.store(dk_ptr + keys, dk, mask=d[None, :] < D)
    tl.store(dbeta_ptr + at, dbeta)
    if DECAYS:
        dtotal += tl.sum(system * product, 1) - tl.sum(turned * product, 1)
        tl.store(dtotal_ptr + at, dtotal)


@torch.library.custom_op("ahn_layers::chunked_scan_backward", mutates_args=())
@on_its_gpu
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


@torch.library.custom_op("ahn_layers::trained_scan", mutates_args=())
@on_its_gpu
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
