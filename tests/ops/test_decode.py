"""The Triton kernels of a decode step, against plain PyTorch: in Triton's interpreter, and on a GPU if there is one."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ahn_layers import Window
from ahn_layers.huggingface.compiled.matvec import merge_matvecs
from ahn_layers.ops.decode import forms
from ahn_layers.ops.decode import step as decode
from ahn_layers.ops.decode.fold import fold_and_read
from ahn_layers.ops.decode.rule import StepRule, follow
from ahn_layers.tokens import Tokens

# rows, query heads, key/value heads, slots, key size, value size, sinks whose queries are turned
ATTENTION = [
    (2, 6, 2, 150, 16, 24, 5),
    (1, 4, 4, 300, 64, 64, 0),
    (2, 7, 1, 70, 40, 40, 70),
    (1, 8, 2, 700, 128, 128, 3),
]
MEMORY = [(16, 24, 2, 6), (64, 64, 3, 3), (40, 80, 1, 2)]  # key size, value size, states, query heads


def error(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def check_attention(device, dtype, tolerance, b, h, g, slots, d, e, sinks):
    q, turned = torch.randn(2, b, h, 1, d, dtype=torch.float64)
    k, v = torch.randn(b, g, slots, d, dtype=torch.float64), torch.randn(b, g, slots, e, dtype=torch.float64)
    for seen in ([slots + 5, 3, 40], [0, slots, slots]):
        seen = torch.tensor(seen[:b])
        options = {"full": False, "q_sinks": turned if sinks else None, "num_sinks": sinks}
        expected = decode.slot_attention(q, k, v, seen, **options)  # float64 never runs in the kernels
        empty = (torch.arange(slots) >= seen.clamp(min=1).unsqueeze(1))[:, None, :, None]
        half = [
            u.to(device, dtype) for u in (q, turned, k.masked_fill(empty, torch.nan), v.masked_fill(empty, torch.nan))
        ]
        options["q_sinks"] = half[1] if sinks else None
        out = decode.slot_attention(half[0], half[2], half[3], seen.to(device), **options)
        assert out.dtype == dtype and error(out, expected) < tolerance


def check_memory(device, d, e, states, heads):
    shapes = ((2, states, d, e), (2, heads, d), (2, states, d), (2, states, e))
    state, q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    k, g, beta = k / d**0.5, -torch.rand(2, states).double(), torch.rand(2, states).double()
    for gates in ((g, beta), (None, beta), (g, None), (None, None)):
        expected = fold_and_read(state, q, k, v, *gates)
        single = [None if u is None else u.to(device, torch.float32) for u in (state, q, k, v, *gates)]
        before = single[0].clone()
        for one, other in zip(fold_and_read(*single), expected, strict=True):
            assert error(one, other) < 1e-5
        assert torch.equal(single[0], before)


def plain_step(q, new, slots, seen, memory, rule, *, num_sinks, q_sinks=None, asking=None, key=None):
    """``decode_step`` in the words of the window and the rule."""
    new, slots = Tokens(*new), Tokens(*slots)
    window = Window(len(slots) - num_sinks, num_sinks=num_sinks)
    slot, leaves = window.slot(seen), window.leaves(seen).view(-1, 1, 1, 1)
    gone = slots.take(slot.unsqueeze(1))
    slots.put(slot, new, None, inplace=True)
    seen += 1
    out = decode.slot_attention(q, slots.k, slots.v, seen, full=False, q_sinks=q_sinks, num_sinks=num_sinks)
    asking, key = q if asking is None else asking, gone.k if key is None else key
    added, reading, after = follow(rule, memory, asking, key, gone.v, gone.gates)
    memory.copy_(torch.where(leaves, after, memory))
    return (out if added is None else out + added.masked_fill(~leaves, 0)), reading.masked_fill(~leaves, 0)


def check_step(device, dtype, tolerance, b, h, g, slots, d, e, sinks, states, delta, matrix):
    """Over several steps, some rows not full at first; empty slots and the scratch memory are poisoned."""

    def low(u):
        return u.to(device, dtype)

    k, v = torch.randn(b, g, slots, d).double(), torch.randn(b, g, slots, e).double()
    seen = torch.tensor([5 * slots + 3, slots - 2, slots][:b])
    gates = [torch.rand(b, states, slots).double() for _ in range(2)]
    memory = torch.randn(b, states, d, e).double()
    half = [low(u) for u in (k, v, *gates)]
    empty = torch.arange(slots) >= seen.unsqueeze(1)
    for u in half[:2]:
        u.masked_fill_(empty[:, None, :, None].to(device), torch.nan)
    exact = [u.double().cpu().nan_to_num() for u in half]
    seen_there, memory_there = seen.clone().to(device), memory.float().to(device)
    for t in range(4):
        sizes = [(b, g, 1, d), (b, g, 1, e), (b, states, 1), (b, states, 1), (b, h, 1, d), (b, h, 1, d), (b, h, 1, d)]
        new = [low(torch.randn(size)) for size in sizes]
        new[2:4] = [u.sigmoid() for u in new[2:4]]
        near = [u.double().cpu() for u in new]
        weight, gate, w = low(torch.randn(e)), low(torch.randn(b, h)), low(torch.randn(h, e, e))
        results = []
        for step, place, slot, token, count, state in (
            (plain_step, lambda u: u.double().cpu(), exact, near, seen, memory),
            (decode.decode_step, lambda u: u, half, new, seen_there, memory_there),
        ):
            rule = StepRule(
                decay="g" if t != 1 else None, rate=place(-torch.ones(states).to(weight)) if t != 2 else None,
                strength=("beta" if t < 3 else "g") if t != 2 else None, delta=delta, read_scale=d**-0.5,
                weight=place(weight) if t != 3 else None, gate=place(gate) if t else None,
                matrix=place(w) if matrix else None,
            )  # fmt: skip
            options = {"q_sinks": token[5] if sinks and t != 1 else None, "num_sinks": sinks}
            options |= {"asking": token[6], "key": token[0]} if t == 1 else {}
            new_token, held = ((u[0], u[1], {"g": u[2], "beta": u[3]}) for u in (token, slot))
            results.append((*step(token[4], new_token, held, count, state, rule, **options), state, *slot))
        assert torch.equal(seen, seen_there.cpu())
        for i, (there, here) in enumerate(zip(results[1], results[0], strict=True)):
            there = there.nan_to_num() if i > 2 else there
            assert error(there, here) < tolerance, (t, i, error(there, here))


def check_matvec(device, dtype, tolerance):
    many = 9000 if device == "cuda" else 1200  # the interpreter is slow
    for size, rows in ((2048, [64, 7, 16, many]), (1100, [30]), (64, [3, 5, 8, 9, 1, 2, 4, 6, 7, 2])):
        layers = [torch.nn.Linear(size, n, bias=i % 2 == 0).to(device, dtype) for i, n in enumerate(rows)]
        x, residual = torch.randn(1, 1, size).to(device, dtype), torch.randn(1, 1, rows[0]).to(device, dtype)

        def function(x, residual, layers=layers):
            outs = [layer(x) for layer in layers]
            return [residual + outs[0]] if len(outs) == 1 else outs

        merged = []

        def backend(graph, _, merged=merged):
            merge_matvecs(graph.graph)
            graph.recompile()
            merged += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return graph.forward

        with torch.no_grad():
            outs = torch.compile(function, backend=backend, dynamic=False)(x, residual)
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

    merged = []

    def backend(graph, _):
        merge_matvecs(graph.graph)
        graph.graph.lint()
        graph.recompile()
        merged.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(1, 1, 32).to(device, dtype)
    with torch.no_grad():
        out = torch.compile(function, backend=backend, dynamic=False)(x)
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
            merged = []

            def backend(graph, _, merged=merged):
                merge_matvecs(graph.graph)
                graph.graph.lint()
                graph.recompile()
                merged += [u for u in graph.graph.nodes if "matvec" in str(u.target)]
                return graph.forward

            x = torch.randn(1, 1, size).to(device, dtype)
            modules.to(dtype)
            with torch.no_grad():
                torch._dynamo.reset()
                found = torch.compile(mlp, backend=backend, dynamic=False)(x, watched)
                modules.double()
                expected = mlp(x.double(), watched)
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
            y = norm(x)
            first, second = layers[0](y), layers[1](y)
            F.silu(layers[2](F.rms_norm(y, (x.shape[-1],)))).unsqueeze(1).sum(-1)  # dead
            return first, second, [y.tanh()] if watched else []

        for watched in (0, 1):
            merged = []

            def backend(graph, _, merged=merged):
                merge_matvecs(graph.graph)
                graph.graph.lint()
                graph.recompile()
                merged += [u for u in graph.graph.nodes if u.op.startswith("call_")]
                return graph.forward

            x = torch.randn(1, 1, size).to(device, dtype)
            modules.to(dtype)
            with torch.no_grad():
                torch._dynamo.reset()
                found = torch.compile(function, backend=backend, dynamic=False)(x, watched)
                modules.double()
                expected = function(x.double(), watched)
            (product,) = (u for u in merged if "matvec" in str(u.target))
            assert len(product.args[1]) == 2 and product.args[6:] == (None, True)[: 2 * watched]
            assert not {"silu", "rms_norm"} & {getattr(u.target, "__name__", "") for u in merged}
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
        merged = []

        def backend(graph, _, merged=merged):
            merge_matvecs(graph.graph)
            graph.recompile()
            merged += [u.args for u in graph.graph.nodes if "matvec" in str(u.target)]
            return graph.forward

        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(function, backend=backend, dynamic=False)(x, case)[0]
            assert error(found, function(x, case)[0].cpu().double()) < 2e-2
        assert len(merged) == 1 and (merged[0][3] is None) == (case < 5) and merged[0][5] == (case < 5)


STEPS = [  # as ATTENTION, then the number of states, whether the rule is a delta rule, whether it says its output
    (2, 6, 2, 150, 16, 24, 5, 6, True, True),
    (3, 4, 4, 300, 64, 64, 0, 4, False, True),
    (2, 7, 1, 70, 40, 40, 4, 1, True, False),
    (1, 8, 2, 700, 128, 128, 3, 8, True, True),
]


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton looks at the variable when it is imported."""
    pytest.importorskip("triton", minversion="3.7")  # an older interpreter does not know newer versions of NumPy
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kernels ran" in done.stdout, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*ATTENTION, (3, 16, 2, 5000, 128, 128, 128), (1, 2, 1, 400, 256, 256, 9)])
def test_attention_on_the_gpu(shape, dtype):
    check_attention("cuda", dtype, {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype], *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*MEMORY, (128, 128, 2, 16), (256, 256, 1, 1)])
def test_memory_on_the_gpu(shape):
    check_memory("cuda", *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [*STEPS, (2, 16, 2, 5000, 128, 128, 128, 16, True, True), (1, 2, 1, 400, 256, 256, 9, 2, False, True)]
)
def test_steps_on_the_gpu(shape, dtype):
    check_step("cuda", dtype, {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}[dtype], *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_one_row_on_the_gpu(dtype):
    check_matvec("cuda", dtype, {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
    check_matvecs_in_a_row("cuda", dtype, {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype])
    check_norms_and_gates("cuda", dtype, {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype])
    check_shared_rows("cuda", dtype, {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype])
    check_what_is_no_norm("cuda", dtype)


if __name__ == "__main__":
    called = []
    rule = forms.in_triton
    forms.in_triton = lambda *tensors, **options: called.append(rule(*tensors, **options)) or called[-1]
    for case in ATTENTION:
        check_attention("cpu", torch.float32, 1e-5, *case)
    check_attention("cpu", torch.float16, 2e-3, *ATTENTION[0])
    for case in MEMORY:
        check_memory("cpu", *case)
    for seed, case in enumerate(STEPS):
        torch.manual_seed(seed)
        check_step("cpu", torch.float32, 2e-5, *case)
    check_step("cpu", torch.float16, 4e-3, *STEPS[0])
    check_matvec("cpu", torch.float16, 2e-3)
    check_matvecs_in_a_row("cpu", torch.float16, 4e-3)
    check_norms_and_gates("cpu", torch.float16, 4e-3)
    check_shared_rows("cpu", torch.float16, 4e-3)
    check_what_is_no_norm("cpu", torch.float16)
    assert called and any(called)
    print("kernels ran")
