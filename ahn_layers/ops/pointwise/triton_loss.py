"""A Triton kernel for the distillation loss.

Both distributions are read twice, and nothing of their size is made but the gradient.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_forms import on_its_gpu

_BLOCK = 4096


@triton.jit
def _compare(
    student_ptr, teacher_ptr, label_ptr, divergence_ptr, entropy_ptr, grad_ptr, size, kl_weight, ce_weight,
    TEACHER: tl.constexpr, LABELS: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * size
    teacher_ptr += row * size
    c = tl.arange(0, BLOCK)
    s_max, s_sum = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    t_max, t_sum = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    between = tl.zeros((), tl.float32)  # sum of exp(t - t_max) (t - s)
    for first in range(0, size, BLOCK):
        inside = first + c < size
        s = tl.load(student_ptr + first + c, mask=inside, other=float("-inf")).to(tl.float32)
        now = tl.maximum(s_max, tl.max(s, 0))
        s_sum = s_sum * tl.exp(s_max - now) + tl.sum(tl.exp(s - now), 0)
        s_max = now
        if TEACHER:
            t = tl.load(teacher_ptr + first + c, mask=inside, other=float("-inf")).to(tl.float32)
            now = tl.maximum(t_max, tl.max(t, 0))
            weight, fade = tl.exp(t - now), tl.exp(t_max - now)
            between = between * fade + tl.sum(tl.where(inside, weight * (t - s), 0.0), 0)
            t_sum = t_sum * fade + tl.sum(weight, 0)
            t_max = now
    s_log = s_max + tl.log(s_sum)
    t_log = t_max + tl.log(t_sum)
    label = 0
    if TEACHER:
        tl.store(divergence_ptr + row, between / t_sum + s_log - t_log)
    if LABELS:
        label = tl.load(label_ptr + row)
        tl.store(entropy_ptr + row, s_log - tl.load(student_ptr + label).to(tl.float32))
    if GRAD:
        for first in range(0, size, BLOCK):
            inside = first + c < size
            s = tl.load(student_ptr + first + c, mask=inside, other=0.0).to(tl.float32)
            grad = tl.exp(s - s_log) * (kl_weight + ce_weight)
            if TEACHER:
                t = tl.load(teacher_ptr + first + c, mask=inside, other=0.0).to(tl.float32)
                grad -= tl.exp(t - t_log) * kl_weight
            if LABELS:
                grad -= tl.where(first + c == label, ce_weight, 0.0)
            tl.store(grad_ptr + row * size + first + c, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@on_its_gpu
def compare(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, kl_weight: float, ce_weight: float, *, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL(teacher || student) and cross-entropy of each row, and the gradient of their weighted sum by the logits.

    Args:
        student: logits ``(n, V)``, float32 or half precision.
        teacher: logits, likewise; without them the divergence is 0.
        labels: ``(n,)`` int64; without them the cross-entropy is 0.
        kl_weight: factor of the divergence, 0 without a teacher.
        ce_weight: factor of the cross-entropy, 0 without labels.
        grad: whether the gradient is wanted, ``(n, V)`` in the dtype of ``student``.
    """
    student = student.contiguous()
    divergence, entropy = torch.zeros(2, len(student), dtype=torch.float32, device=student.device)
    gradient = torch.empty_like(student) if grad else None
    _compare[(len(student),)](
        student, student if teacher is None else teacher.contiguous(), student if labels is None else labels,
        divergence, entropy, gradient if gradient is not None else student, student.shape[1], kl_weight, ce_weight,
        TEACHER=teacher is not None, LABELS=labels is not None, GRAD=grad, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return divergence, entropy, gradient
