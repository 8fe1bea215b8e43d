"""The Triton kernels of a decode step, against plain PyTorch: in Triton's interpreter, and on a GPU if there is one."""

import pytest
import torch

from ahn_layers import Window
from ahn_layers.ops.decode import forms
from ahn_layers.ops.decode import step as decode
from ahn_layers.ops.decode.fold import fold_and_read
from ahn_layers.ops.decode.rule import StepRule, follow
from ahn_layers.tokens import Tokens

from ..interpreted import run_in_the_interpreter

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


STEPS = [  # as ATTENTION, then the number of states, whether the rule is a delta rule, whether it says its output
    (2, 6, 2, 150, 16, 24, 5, 6, True, True),
    (3, 4, 4, 300, 64, 64, 0, 4, False, True),
    (2, 7, 1, 70, 40, 40, 4, 1, True, False),
    (1, 8, 2, 700, 128, 128, 3, 8, True, True),
]


def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__name__)


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
    assert called and any(called)
    print("kernels ran")
