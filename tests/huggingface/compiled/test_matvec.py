"""Products of one row that are merged into one launch: in Triton's interpreter, and on a GPU if there is one."""

import copy

import pytest
import torch
from torch.nn import functional as F

from ahn_layers.huggingface.compiled.matvec import merge_matvecs

from ...interpreted import run_in_the_interpreter


def error(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def merge(function, *inputs):
    """Outputs of a function whose products have been merged, and the operations that it then consists of."""
    calls = []

    def backend(graph, _):
        merge_matvecs(graph.graph)
        graph.graph.lint()
        graph.recompile()
        calls.extend(node for node in graph.graph.nodes if node.op.startswith("call_"))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend, dynamic=False)(*inputs), calls


def matvecs(calls):
    return [node for node in calls if "matvec" in str(node.target)]


def check_matvec(device, dtype, tolerance):
    many = 9000 if device == "cuda" else 1200  # the interpreter is slow
    for size, rows in ((2048, [64, 7, 16, many]), (1100, [30]), (64, [3, 5, 8, 9, 1, 2, 4, 6, 7, 2])):
        layers = [torch.nn.Linear(size, n, bias=i % 2 == 0).to(device, dtype) for i, n in enumerate(rows)]
        x, residual = torch.randn(1, 1, size).to(device, dtype), torch.randn(1, 1, rows[0]).to(device, dtype)

        def function(x, residual, layers=layers):
            outs = [layer(x) for layer in layers]
            return [residual + outs[0]] if len(outs) == 1 else outs

        outs, calls = merge(function, x, residual)
        merged = [str(node.target) for node in calls]
        with torch.no_grad():
            for layer in layers:
                layer.double()
            expected = function(x.double(), residual.double())
        assert merged.count("ahn_layers.matvec.default") == -(-len(rows) // 8)
        assert not any("linear" in target or "add" in target.split(".")[-1] for target in merged)
        for out, other in zip(outs, expected, strict=True):
            assert out.dtype == dtype and out.shape == other.shape and error(out, other.cpu()) < tolerance


def check_matvecs_in_a_row(device, dtype, tolerance):
    """As in a decoder layer: two sums with the residual, one on the other; and a layer that is given a bare sum."""
    layers = [torch.nn.Linear(32, 32).to(device, dtype) for _ in range(4)]

    def function(x):
        first, second, third, fourth = layers
        x = x + first(x)
        x = x + second(torch.relu(x))
        return fourth(x + third(x))

    x = torch.randn(1, 1, 32).to(device, dtype)
    out, calls = merge(function, x)
    merged = [str(node.target) for node in calls]
    with torch.no_grad():
        for layer in layers:
            layer.double()
        assert error(out, function(x.double()).cpu()) < tolerance
    assert merged.count("ahn_layers.matvec.default") == 4 and not any("linear" in target for target in merged)


class Norm(torch.nn.Module):
    """As decoder layers of transformers have it."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def check_norms_and_gates(device, dtype, tolerance):
    """An MLP with its norm and its residual is two launches; what else looks at the norm or a factor still can."""
    for size, inner, bias in ((96, 200, False), (64, 40, True), (1100, 70, False)):
        gate, up = (torch.nn.Linear(size, inner, bias=bias) for _ in range(2))
        modules = torch.nn.ModuleList([gate, up, torch.nn.Linear(inner, size), Norm(size)]).to(device, dtype)

        def mlp(x, watched, modules=modules):
            gate, up, down, norm = modules
            y = norm(x)
            left, right = gate(y), up(y)
            product = right * F.silu(left) if watched == 2 else F.silu(left) * right
            out = x + down(product)
            return out, [y, right][:watched] if watched < 2 else []

        for watched in range(3 if size < 100 else 1):  # the graphs are those of any size
            x = torch.randn(1, 1, size).to(device, dtype)
            found, calls = merge(mlp, x, watched)
            merged = matvecs(calls)
            with torch.no_grad():
                expected = mlp(x.double(), watched, copy.deepcopy(modules).double())
            assert len(merged) == 2 and all(u.args[3] is not None for u in merged[:1])
            assert [u.args[5] for u in merged] == [True, False] and len(merged[1].args) == 7
            for u, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
                assert u.shape == other.shape and error(u, other.cpu()) < tolerance


def check_shared_rows(device, dtype, tolerance):
    """What else looks at the normed row gets it from the product; what nothing looks at is not computed."""
    for size in (96, 1100):
        modules = torch.nn.ModuleList([*(torch.nn.Linear(size, n) for n in (40, 7, 30)), Norm(size)]).to(device, dtype)

        def function(x, watched, modules=modules):
            *layers, norm = modules
            y = x.tanh() if watched == 2 else norm(x)
            first, second = layers[0](y), layers[1](y)
            F.silu(layers[2](F.rms_norm(y, (x.shape[-1],)))).unsqueeze(1).sum(-1)  # dead
            return first, second, [y.tanh()] if watched == 1 else []

        for watched in range(3):
            x = torch.randn(1, 1, size).to(device, dtype)
            found, calls = merge(function, x, watched)
            with torch.no_grad():
                expected = function(x.double(), watched, copy.deepcopy(modules).double())
            (product,) = matvecs(calls)
            assert len(product.args[1]) == 2 and product.args[6:] == ((None, True) if watched == 1 else ())
            assert not {"silu", "rms_norm"} & {getattr(u.target, "__name__", "") for u in calls}
            for u, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
                assert u.shape == other.shape and error(u, other.cpu()) < tolerance


def check_what_is_no_norm(device, dtype):
    """The layers are merged, and nothing else is taken in."""
    first, second = (torch.nn.Linear(64, 64).to(device, dtype) for _ in range(2))
    weight = torch.rand(64, device=device, dtype=dtype)

    def function(x, case):
        high = x.to(torch.float32)
        square = high.abs() if case == 0 else high.pow(3 if case == 1 else 2)
        root = torch.rsqrt(square.mean(-1, keepdim=True) + (1e-5 if case != 2 else high[..., :1].square()))
        y = (weight.exp() if case == 3 else weight) * ((high + 1 if case == 4 else high) * root).to(dtype)
        left, right = first(y), second(y)
        return (left.tanh() if case == 5 else F.silu(left)) * right, (right if case == 6 else None)

    x = torch.randn(1, 1, 64).abs().to(device, dtype)
    for case in range(7):
        (found, _), calls = merge(function, x, case)
        merged = [u.args for u in matvecs(calls)]
        with torch.no_grad():
            assert error(found, function(x, case)[0].cpu().double()) < 2e-2
        assert len(merged) == 1 and (merged[0][3] is None) == (case < 5) and merged[0][5] == (case < 5)


def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_one_row_on_the_gpu(dtype):
    check_matvec("cuda", dtype, {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
    check_matvecs_in_a_row("cuda", dtype, {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype])
    check_norms_and_gates("cuda", dtype, {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype])
    check_shared_rows("cuda", dtype, {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype])
    check_what_is_no_norm("cuda", dtype)


if __name__ == "__main__":
    check_matvec("cpu", torch.float16, 2e-3)
    check_matvecs_in_a_row("cpu", torch.float16, 4e-3)
    check_norms_and_gates("cpu", torch.float16, 4e-3)
    check_shared_rows("cpu", torch.float16, 4e-3)
    check_what_is_no_norm("cpu", torch.float16)
    print("kernels ran")
