"""Decode steps with kept tokens in kernels, against the plain form in float64: in the interpreter, and on a GPU."""

import sys

import pytest
import torch

from ahn_layers import Compressor, MemoryStore, Rotary, SalientSlots, Window

from ..huggingface.compiled.graphs import models  # noqa: F401 - a fixture: without checks of shapes
from ..interpreted import run_in_the_interpreter
from ..models import tokens

FREQUENCIES = 10.0 ** -torch.linspace(0, 4, 32, dtype=torch.float64)
# rows, query heads, key/value heads, key size, sinks, window, slots, compressor, options of the store and the slots
CASES = [
    (2, 4, 2, 16, 2, 14, 9, "GatedDeltaNet", {}, {"score": "learned"}),
    (2, 2, 2, 40, 0, 20, 5, "Mamba2", {}, {"score": "value_norm", "rate": 0.05}),
    (1, 3, 1, 16, 4, 10, 17, None, {}, {"score": "learned", "positions": "absolute"}),
    (1, 4, 2, 16, 1, 12, 7, "LinearAttention", {"memory_positions": "none"}, {"score": "key_norm"}),
    (1, 2, 2, 16, 1, 12, 7, "DeltaNet", {"memory_positions": "none"}, {"score": "recent", "rate": 1.0}),
    (1, 2, 1, 16, 1, 12, 1, "GatedDeltaNet", {"interleaved": True}, {"score": "recent"}),
    (1, 2, 1, 16, 1, 12, 6, "GatedDeltaNet", {"interleaved": None}, {"score": "learned"}),
    (1, 2, 2, 16, 1, 12, 40, "GatedDeltaNet", {}, {"score": "learned", "score_size": 300}),
    (1, 2, 2, 16, 1, 12, 6, "GatedDeltaNet", {"replaced": True}, {"score": "learned"}),
]


class Replaced(torch.nn.Linear):
    """A layer that the kernel does not know: the score is computed outside."""

    def forward(self, x):
        return super().forward(x)


def store_of(b, h, g, d, sinks, window, slots, compressor, options, slot_options):
    """In float64, with gates and scores that say something."""
    torch.manual_seed(slots)
    sizes = {"hidden_size": 24, "num_heads": h, "head_dim": d, "num_kv_heads": g, "value_dim": d}
    memory = None if compressor is None else Compressor.by_name[compressor](**sizes)
    turns = options.get("interleaved", False)
    rotary = None if turns is None else Rotary(FREQUENCIES[: d // 4], 50, interleaved=turns, start=d // 4)
    eviction = SalientSlots(slots, **slot_options).for_layer(**sizes)
    positions = options.get("memory_positions", "absolute")
    if options.get("replaced"):
        eviction.learned.direct.__class__ = Replaced
    store = MemoryStore(Window(window, sinks), memory, rotary, eviction=eviction, memory_positions=positions).double()
    with torch.no_grad():
        for name, parameter in store.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 - (3 if "rate" in name else 0))
    return store


def check_kept(device, dtype, tolerance, *case):
    """A prompt, some steps in place, a few tokens at once, steps again: outputs and what is held stay equal."""
    b, h, g, d, sinks, window, slots = case[:7]
    exact, prompt = store_of(*case), window + sinks + max(slots - 3, 0)
    again, total = prompt + 9, prompt + 18
    near = store_of(*case).to(device, dtype)
    if near.compressor is not None:
        near.compressor.float()
    q, k, v = (torch.randn(b, heads, total, d).to(dtype) for heads in (h, g, g))
    x = torch.randn(b, total, 24).to(dtype)
    inputs, state, other = (q, k, v, x), None, None
    sizes = [prompt, *[1] * (again - prompt), 5, *[1] * 4]
    start = 0
    for size in sizes:
        part = [u.narrow(-2, start, size) for u in inputs]
        out, state = exact(*(u.double() for u in part), state)
        if other is not None:
            other.inplace = True
        found, other = near(*(u.to(device) for u in part), other)
        gap = (found.double().cpu() - out).norm() / out.norm()
        assert gap < tolerance, (start, float(gap))
        start += size
    for name, u in state.kept.items():
        same = _ordered(other.kept, name).double().cpu() - _ordered(state.kept, name).double()
        assert same.norm() <= tolerance * max(1, float(u.double().norm())), name
    if state.memory is not None:
        assert (other.memory.double().cpu() - state.memory).norm() < 20 * tolerance * state.memory.norm()
    return True


def _ordered(kept, name):
    u = kept[name]
    if not name.startswith(("k", "v", "gates")):
        return u
    order = kept["gates.eviction.rank"].argsort(dim=2, stable=True)
    order = order.repeat_interleave(u.shape[1] // order.shape[1], dim=1)
    return u.gather(2, order[..., None].expand_as(u) if u.ndim == 4 else order)


def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case", [*CASES, (2, 16, 2, 128, 128, 700, 150, "GatedDeltaNet", {}, {"score": "value_norm", "rate": 0.01})]
)
def test_steps_on_the_gpu(case, dtype):
    if dtype == torch.bfloat16 and case[9]["score"] == "learned":
        pytest.skip("scores are rounded, so other tokens are kept")
    with torch.no_grad():
        check_kept("cuda", dtype, 2e-2 if dtype == torch.bfloat16 else 3e-5, *case)


@pytest.mark.gpu
def test_static_and_dynamic_caches_agree_on_the_gpu(models):  # noqa: F811
    ahn = sys.modules["ahn_layers"]
    model = (
        models.retrofitted(window_size=12, num_sinks=2, eviction=ahn.SalientSlots(9, score="value_norm")).cuda().float()
    )
    ids = tokens(2, 60).cuda()
    options = {"max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), plain)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **options), plain)


if __name__ == "__main__":
    import ahn_layers.step as step

    called, run = [], step.decode_step
    step.decode_step = lambda *args, **options: called.append(options["kept"] is not None) or run(*args, **options)
    with torch.no_grad():
        for case in CASES:
            count = len(called)
            check_kept("cpu", torch.float32, 3e-5, *case)
            if case[7] in ("Mamba2", "DeltaNet"):
                check_kept("cpu", torch.float16, 5e-3, *case)
            assert len(called) > count and all(called), case
    print("kernels ran")
