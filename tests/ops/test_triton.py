"""The Triton kernels of the scans, against the chunked PyTorch form: in Triton's interpreter, and on a GPU."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from ahn_layers.distillation.loss import sliced_loss
from ahn_layers.ops.attention.join import join
from ahn_layers.ops.pointwise.normalize import gated_rms_norm, l2_normalize
from ahn_layers.ops.pointwise.rotary import turn_back
from ahn_layers.ops.recurrence.delta_scan import gated_delta_scan
from ahn_layers.ops.recurrence.forms import runs_in_triton
from ahn_layers.ops.recurrence.linear_scan import gated_linear_scan

from ..interpreted import run_in_the_interpreter

# tokens, key/value heads, states, query heads, key size, value size
SHAPES = [(70, 1, 2, 6, 16, 24), (64, 1, 2, 2, 32, 16), (2, 2, 2, 2, 16, 16), (130, 1, 1, 2, 40, 48)]
CASES = [(gated_delta_scan, "beta g"), (gated_delta_scan, "beta"), (gated_linear_scan, "g"), (gated_linear_scan, "")]
HALF = (torch.float16, torch.bfloat16)


def check_scans(device, dtype, tokens, heads, states, queries, d, e):
    """Values and gradients; in half precision the inputs are rounded first, so that only the kernels' error counts."""
    given = {
        "state": torch.randn(2, states, d, e),
        "q": torch.randn(2, queries, tokens, d).to(dtype),
        "k": F.normalize(torch.randn(2, heads, tokens, d), dim=-1),
        "v": torch.randn(2, heads, tokens, e).to(dtype),
        "beta": torch.rand(2, tokens, states).transpose(1, 2),  # as projections give them, not contiguous
        "g": -(torch.rand(2, tokens, states) ** 4).transpose(1, 2),
    }
    given["k"][:, :, tokens // 2 :] = given["k"][:, :, :1]  # the same key again and again: the system at its worst
    given["k"], given["beta"][:, :, tokens // 2 :] = given["k"].to(dtype), 1
    grads = torch.randn(2, queries, tokens, e).to(dtype), torch.randn(2, states, d, e)
    for scan, gates in CASES:
        names, found = ["state", "q", "k", "v", *gates.split()], []
        for place, exact in (("cpu", True), (device, False)):
            inputs = {name: given[name].to(place, torch.float64 if exact else None).clone() for name in names}
            copies = {name: u.clone() for name, u in inputs.items()}
            with torch.no_grad():
                outs = scan(**inputs)
            same = scan(**{name: u.requires_grad_() for name, u in inputs.items()})
            if dtype in HALF and not exact:
                in_kernels = runs_in_triton(inputs["state"], inputs["k"])
                assert outs[0].dtype == (dtype if in_kernels else torch.float32) and outs[1].dtype == torch.float32
            ends = [u.to(place, out.dtype) for u, out in zip(grads, same, strict=True)]
            found.append([*outs, *same, *torch.autograd.grad(same, list(inputs.values()), ends)])
            assert all(torch.equal(u, copies[name]) for name, u in inputs.items())
            assert place == "cpu" or [u.dtype for u in found[-1][4:]] == [u.dtype for u in inputs.values()]
        for exact, kernel in zip(*found, strict=True):
            error = (kernel.double().cpu() - exact).norm() / exact.norm()
            assert error < {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype], (scan, names, error)


def check_normalizations(device, dtype):
    u, g = torch.randn(2, 2, 5, 37, 24).to(dtype).transpose(2, 3)  # neither contiguous nor a power of two
    weight, gate = torch.randn(24), torch.randn(2, 5, 37).transpose(1, 2)
    found = []
    for place, exact in (("cpu", True), (device, False)):
        x, w, z, y = (t.to(place, torch.float64 if exact else None).detach() for t in (u, weight, gate, g))
        leaves = [t.requires_grad_() for t in (x, w, z)]
        unit, gated = l2_normalize(x, scale=0.3), gated_rms_norm(x, w, z)
        assert exact or unit.dtype == gated.dtype == dtype
        found.append([unit, *torch.autograd.grad(unit, x, y), gated, *torch.autograd.grad(gated, leaves, y)])
    for exact, kernel in zip(*found, strict=True):
        error = (kernel.double().cpu() - exact).norm() / exact.norm()
        assert error < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def check_join(device, dtype):
    for count, backwards in ((2, None), (3, 2), (4, 0), (4, 2)):
        outs = tuple(torch.randn(2, 3, 7, 24).to(device, dtype).transpose(1, 2) for _ in range(count))
        lses = tuple(3 * torch.randn(2, 3, 7, device=device) for _ in range(count))
        exact = join(*(tuple(u.cpu().double() for u in us) for us in (outs, lses)), backwards)
        for found, wanted in zip(join(outs, lses, backwards), exact, strict=True):
            assert (found.cpu().double() - wanted).norm() / wanted.norm() < (5e-3 if dtype in HALF else 1e-6)


def check_rotary(device, dtype):
    q, grad = torch.randn(2, 2, 11, 3, 24).to(dtype).transpose(2, 3)
    inv_freq = 10.0 ** -torch.arange(5.0)
    for interleaved, start, distance in ((False, 0, torch.arange(11) * 1000), (True, 3, torch.randint(9999, (2, 11)))):
        options = {"interleaved": interleaved, "start": start}
        results = []
        for u, place in ((q.double(), "cpu"), (q, device)):
            leaf = u.to(place).detach().requires_grad_()
            out = turn_back(leaf, distance.to(place), inv_freq.to(place), **options)
            results.append([out, *torch.autograd.grad(out, leaf, grad.to(place, out.dtype))])
        for exact, found in zip(*results, strict=True):
            assert found.dtype == dtype
            assert (found.cpu().double() - exact).norm() / exact.norm() < (5e-3 if dtype in HALF else 1e-6)


def check_loss(device, dtype):
    """More logits than a block; the same three results, with and without a teacher and labels."""
    head = torch.nn.Linear(16, 5000, bias=False)
    student, teacher = torch.randn(2, 9, 16).to(dtype)
    labels = torch.randint(5000, (9,))
    for given in ({"teacher": teacher}, {"teacher": teacher, "labels": labels, "ce_weight": 0.3}, {
        "labels": labels, "kl_weight": 0.0, "ce_weight": 1.0}):  # fmt: skip
        found = []
        for place, precise in (("cpu", torch.float64), (device, dtype)):
            weight = head.weight.detach().to(dtype).to(place, precise)
            inputs = {n: u.to(place, precise if u.is_floating_point() else None) if isinstance(u, torch.Tensor) else u
                      for n, u in given.items()}  # fmt: skip
            h = student.to(place, precise).requires_grad_()
            loss, *parts = sliced_loss(h, lambda u, w=weight: u @ w.T, slice_size=4, **inputs)
            found.append([loss, *parts, torch.autograd.grad(loss, h)[0]])
        for exact, kernel in zip(*found, strict=True):
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
            assert (kernel.double().cpu() - exact).norm() <= tolerance * exact.norm()


def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, (1000, 2, 16, 16, 128, 128), (777, 3, 9, 9, 64, 64), (777, 3, 3, 9, 64, 64), (64, 1, 2, 2, 64, 64)],
)
def test_kernels_on_the_gpu(shape, dtype):
    check_scans("cuda", dtype, *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_normalizations_on_the_gpu(dtype):
    check_normalizations("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_join_and_rotary_on_the_gpu(dtype):
    check_join("cuda", dtype)
    check_rotary("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_on_the_gpu(dtype):
    check_loss("cuda", dtype)


def main():
    import ahn_layers.ops.recurrence.triton_scan_backward as backward
    from ahn_layers.ops.attention import triton_join
    from ahn_layers.ops.pointwise import triton_loss, triton_normalize, triton_rotary
    from ahn_layers.ops.recurrence import triton_scan

    run, train, called = triton_scan.chunked_scan, backward.trained_scan, []
    with (
        patch.object(triton_scan, "chunked_scan", lambda *tensors: called.append(1) or run(*tensors)),
        patch.object(backward, "trained_scan", lambda *tensors: called.append(1) or train(*tensors)),
    ):
        for shape in SHAPES:
            check_scans("cpu", torch.float32, *shape)
        assert len(called) == 8 * len(SHAPES)  # float64 has none; not the PyTorch form under another name
        check_scans("cpu", torch.float16, *SHAPES[0])
    assert backward.chunked_scan_backward is not None
    with patch.object(triton_normalize, "_launch_l2", side_effect=triton_normalize._launch_l2) as launched:
        check_normalizations("cpu", torch.float16)
    assert launched.call_count == 2
    with patch.object(triton_join, "join", side_effect=triton_join.join) as joined:
        check_join("cpu", torch.float32)
    assert joined.call_count == 4
    with patch.object(triton_rotary, "turn", side_effect=triton_rotary.turn) as turned:
        check_rotary("cpu", torch.float32)
    assert turned.call_count == 4  # forward and backward
    with patch.object(triton_loss, "compare", side_effect=triton_loss.compare) as compared:
        check_loss("cpu", torch.float32)
    assert compared.call_count == 9
    print("kernels ran")


if __name__ == "__main__":
    main()
