"""The Triton kernels of the scans, against the chunked PyTorch form: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ahn_layers.ops.delta_scan import gated_delta_scan
from ahn_layers.ops.linear_scan import gated_linear_scan

GPU = torch.cuda.is_available()
# tokens, states, query heads, key size, value size
SHAPES = [(70, 2, 6, 16, 24), (64, 1, 1, 32, 16), (2, 2, 2, 16, 16), (130, 1, 2, 40, 48)]


def check(device, tokens, states, heads, d, e):
    q, k = torch.randn(2, heads, tokens, d), F.normalize(torch.randn(2, states, tokens, d), dim=-1)
    k[:, :, tokens // 2 :] = k[:, :, :1]  # the same key again and again: the system is at its worst
    v, state = torch.randn(2, states, tokens, e), torch.randn(2, states, d, e)
    g, beta = -(torch.rand(2, states, tokens) ** 4), torch.rand(2, states, tokens)
    beta[:, :, tokens // 2 :] = 1
    for scan, gates in (
        (gated_delta_scan, (beta, g)),
        (gated_delta_scan, (beta, None)),
        (gated_linear_scan, (g,)),
        (gated_linear_scan, (None,)),
    ):
        given = [u for u in (state, q, k, v, *gates) if u is not None]
        found = []
        for dtype, place in ((torch.float64, "cpu"), (torch.float32, device)):
            inputs = [u.to(place, dtype).clone() for u in given]
            none = [None] if gates[-1] is None else []
            with torch.no_grad():
                outs = scan(*inputs, *none)
            leaves = [u.requires_grad_() for u in inputs]
            same = scan(*leaves, *none)
            loss = sum((u * u.detach().cos()).sum() for u in same)
            found.append([*outs, *same, *torch.autograd.grad(loss, leaves)])
            assert all(torch.equal(u, v.to(place, dtype)) for u, v in zip(inputs, given, strict=True))
        for exact, kernel in zip(*found, strict=True):
            assert (kernel.double().cpu() - exact).norm() / exact.norm() < 3e-5


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton looks at the variable when it is imported."""
    pytest.importorskip("triton", minversion="3.7")  # an older interpreter does not know newer versions of NumPy
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kernels ran" in done.stdout, done.stderr


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 16, 16, 128, 128), (777, 3, 9, 64, 64)])
def test_kernels_on_the_gpu(shape):
    check("cuda", *shape)


if __name__ == "__main__":
    from ahn_layers.ops import triton_scan

    assert triton_scan.tl.dot.__module__  # imported with the interpreter on
    called = []
    scan = triton_scan.chunked_scan
    triton_scan.chunked_scan = lambda *tensors: called.append(1) or scan(*tensors)
    for case in SHAPES:
        check("cpu", *case)
    assert len(called) == 8 * len(SHAPES)
    print("kernels ran")
