"""Triton kernels for the gradients of the chunked scans, which ``triton_scan_backward`` launches."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from .triton_scan import load_rows


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
