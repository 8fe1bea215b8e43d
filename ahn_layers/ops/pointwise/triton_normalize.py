"""Triton kernels for the normalisations around a scan in half precision: one pass over memory, float32 inside."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead import Kernel
from ..triton_forms import operator

_ROWS = 32


@triton.jit
def _load(ptr, row, heads, length, b, h, t, e, SIZE: tl.constexpr, rows):
    """A block of rows of a ``(B, H, T, E)`` tensor with these strides; row ``(b H + h) T + t``."""
    at = row // (heads * length) * b + row // length % heads * h + row % length * t
    return tl.load(ptr + at[:, None] + e[None, :], mask=(row[:, None] < rows) & (e[None, :] < SIZE), other=0.0)


@Kernel
@triton.jit(do_not_specialize=["rows", "heads", "length"])
def _l2(
    u_ptr, grad_ptr, out_ptr, rows, heads, length, u_b, u_h, u_t, g_b, g_h, g_t, scale, eps,
    SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PAD)
    u = _load(u_ptr, row, heads, length, u_b, u_h, u_t, e, SIZE, rows).to(tl.float32)
    factor = tl.rsqrt(tl.sum(u * u, 1) + eps)
    out = u * factor[:, None]
    if BACKWARD:
        grad = _load(grad_ptr, row, heads, length, g_b, g_h, g_t, e, SIZE, rows).to(tl.float32)
        out = (grad - out * tl.sum(grad * out, 1)[:, None]) * factor[:, None]
    at = row[:, None] * SIZE + e[None, :]
    tl.store(out_ptr + at, (out * scale).to(out_ptr.dtype.element_ty), mask=(row[:, None] < rows) & (e[None, :] < SIZE))


def _launch_l2(u: Tensor, grad: Tensor | None, scale: float, eps: float) -> Tensor:
    u = u if u.stride(-1) == 1 else u.contiguous()
    grad = u if grad is None else grad if grad.stride(-1) == 1 else grad.contiguous()
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    rows, size = u.shape[:-1].numel(), u.shape[-1]
    _l2[(triton.cdiv(rows, _ROWS),)](
        u, grad, out, rows, *u.shape[1:3], *u.stride()[:3], *grad.stride()[:3], scale, eps,
        SIZE=size, PAD=triton.next_power_of_2(size), BLOCK=_ROWS, BACKWARD=grad is not u, num_warps=4,
    )  # fmt: skip
    return out


@operator("ahn_layers::l2_normalize")
def l2_normalize(u: Tensor, scale: float, eps: float) -> Tensor:
    """``scale * u / sqrt(sum(u^2) + eps)`` over the last dimension of ``(B, H, T, D)``, contiguous."""
    return _launch_l2(u, None, scale, eps)


@operator("ahn_layers::l2_normalize_backward")
def l2_normalize_backward(grad: Tensor, u: Tensor, scale: float, eps: float) -> Tensor:
    """The gradient of ``l2_normalize``."""
    return _launch_l2(u, grad.to(u.dtype), scale, eps)


l2_normalize.register_fake(lambda u, scale, eps: u.new_empty(u.shape))
l2_normalize_backward.register_fake(lambda grad, u, scale, eps: u.new_empty(u.shape))


def _save_l2(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, ctx.scale, ctx.eps = inputs
    ctx.save_for_backward(u)


def _backward_l2(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return l2_normalize_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.eps), None, None


l2_normalize.register_autograd(_backward_l2, setup_context=_save_l2)


@Kernel
@triton.jit(do_not_specialize=["rows", "heads", "length", "gate_b", "gate_h", "gate_t"])
def _gated_rms(
    r_ptr, weight_ptr, gate_ptr, grad_ptr, out_ptr, dweight_ptr, dgate_ptr, rows, heads, length,
    r_b, r_h, r_t, gate_b, gate_h, gate_t, g_b, g_h, g_t, eps,
    SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PAD)
    r = _load(r_ptr, row, heads, length, r_b, r_h, r_t, e, SIZE, rows).to(tl.float32)
    weight = tl.load(weight_ptr + e, mask=e < SIZE, other=0.0).to(tl.float32)[None, :]
    at = row // (heads * length) * gate_b + row // length % heads * gate_h + row % length * gate_t
    gate = tl.load(gate_ptr + at, mask=row < rows, other=0.0)
    open = tl.sigmoid(gate)
    factor = tl.rsqrt(tl.sum(r * r, 1) / SIZE + eps)[:, None]
    normal = r * factor
    if BACKWARD:
        grad = _load(grad_ptr, row, heads, length, g_b, g_h, g_t, e, SIZE, rows).to(tl.float32)
        along = grad * normal
        silu = gate * open
        tl.store(dweight_ptr + tl.program_id(0) * SIZE + e, tl.sum(along * silu[:, None], 0), mask=e < SIZE)
        dgate = tl.sum(along * weight, 1) * (open + silu * (1.0 - open))
        tl.store(dgate_ptr + row, dgate, mask=row < rows)
        grad *= weight * silu[:, None]
        out = (grad - normal * (tl.sum(grad * normal, 1) / SIZE)[:, None]) * factor
    else:
        out = normal * weight * (gate * open)[:, None]
    tl.store(
        out_ptr + row[:, None] * SIZE + e[None, :], out.to(out_ptr.dtype.element_ty),
        mask=(row[:, None] < rows) & (e[None, :] < SIZE),
    )  # fmt: skip


def _launch_gated(
    r: Tensor, weight: Tensor, gate: Tensor, grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    r = r if r.stride(-1) == 1 else r.contiguous()
    given = r if grad is None else grad if grad.stride(-1) == 1 else grad.contiguous()
    out, rows, size = torch.empty(r.shape, dtype=r.dtype, device=r.device), r.shape[:-1].numel(), r.shape[-1]
    programs = triton.cdiv(rows, _ROWS)
    dweight, dgate = out, out
    if grad is not None:
        dweight = torch.empty(programs, size, dtype=torch.float32, device=r.device)
        dgate = torch.empty(gate.shape, dtype=torch.float32, device=r.device)
    _gated_rms[(programs,)](
        r, weight.contiguous(), gate, given, out, dweight, dgate, rows, *r.shape[1:3],
        *r.stride()[:3], *gate.stride(), *given.stride()[:3], eps,
        SIZE=size, PAD=triton.next_power_of_2(size), BLOCK=_ROWS, BACKWARD=grad is not None, num_warps=4,
    )  # fmt: skip
    return out, dweight, dgate


@operator("ahn_layers::gated_rms_norm")
def gated_rms_norm(r: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """``r / sqrt(mean(r^2) + eps) * weight * silu(gate)``, of ``(B, H, T, E)`` and a float32 gate ``(B, H, T)``."""
    return _launch_gated(r, weight, gate, None, eps)[0]


@operator("ahn_layers::gated_rms_norm_backward")
def gated_rms_norm_backward(
    grad: Tensor, r: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``gated_rms_norm`` by ``r``, ``weight`` and ``gate``."""
    dr, dweight, dgate = _launch_gated(r, weight, gate, grad.to(r.dtype), eps)
    return dr, dweight.sum(0).to(weight.dtype), dgate.to(gate.dtype)


gated_rms_norm.register_fake(lambda r, weight, gate, eps: r.new_empty(r.shape))
gated_rms_norm_backward.register_fake(
    lambda grad, r, weight, gate, eps: (r.new_empty(r.shape), torch.empty_like(weight), gate.new_empty(gate.shape))
)


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_gated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


gated_rms_norm.register_autograd(_backward_gated, setup_context=_save_gated)
