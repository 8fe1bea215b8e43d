"""Kernels that are compiled ahead are the ones that are launched, and no length of a prompt needs its own.

Without a GPU: kernels are asked for, for a Hopper card, but neither compiled nor launched.
"""

import importlib
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ahn_layers import DeltaNet, GatedDeltaNet, Mamba2, MemoryStore, SalientSlots, Window
from ahn_layers.huggingface import first_prompt
from ahn_layers.ops import ahead
from ahn_layers.ops.attention import flash_attention, forms, pieces
from ahn_layers.positions import Rotary

WINDOW, PIECE, SINKS, GROUPS = 1920, 512, 128, 2
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def asked(monkeypatch):
    """The kernels that have been asked for: name and key, as often as it happened."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    package, kernels = Path(find_spec("ahn_layers").origin).parent, []
    for path in package.rglob("triton_*.py"):
        module = importlib.import_module(".".join(path.relative_to(package.parent).with_suffix("").parts))
        kernels += [u for u in vars(module).values() if isinstance(u, ahead.Kernel)]
        if hasattr(module, "early_launch"):
            monkeypatch.setattr(module, "early_launch", lambda u: {"EARLY": True, "launch_pdl": True})
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # after kernels have been imported: forms choose as on a GPU
    monkeypatch.setattr(forms, "is_fused", lambda q, v: True)
    monkeypatch.setattr(forms, "has_cudnn", lambda q: True)
    monkeypatch.setattr(pieces, "cudnn", lambda q, *_: (torch.zeros_like(q).transpose(1, 2), q.float().sum(-1)))
    monkeypatch.setattr(
        flash_attention, "_flash", lambda part, _: (torch.zeros_like(part[0]), part[0].float().sum(-1).mT, (None, None))
    )
    top = importlib.import_module("ahn_layers.ops.slots.triton_top")  # what its kernel would fill are indices
    monkeypatch.setattr(top, "torch", SimpleNamespace(empty=torch.zeros, long=torch.long))
    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    keys = []

    def hook(*, key, fn, **_):
        keys.append((fn.name, key))
        return True  # it is neither compiled nor launched

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    for kernel in kernels:
        kernel.function.device_caches.clear()
    yield keys
    for kernel in kernels:
        kernel.function.device_caches.clear()


def make_store(compressor, dtype, heads, size, slots=0, **options):
    """A store whose sinks are turned back once the window is full."""
    rotary = Rotary(10.0 ** -torch.arange(size // 2), trained_length=WINDOW)
    sizes = {"hidden_size": 48, "num_kv_heads": GROUPS}
    made = compressor(num_heads=heads, head_dim=size, **sizes)
    eviction = SalientSlots(slots).for_layer(**sizes, value_dim=size) if slots else None
    return MemoryStore(Window(WINDOW, num_sinks=SINKS), made, rotary, eviction=eviction, **options).to(dtype).eval()


def really(store, dtype, lengths):
    """Read pieces with tensors that exist."""
    compressor, state = store.compressor, None
    with torch.no_grad():
        for length in lengths:
            q, k, v = (
                torch.randn(1, length, heads, compressor.head_dim, dtype=dtype).transpose(1, 2)
                for heads in (compressor.num_heads, GROUPS, GROUPS)
            )
            _, state = store(q, k, v, torch.randn(1, length, compressor.hidden_size, dtype=dtype), state)


@pytest.mark.parametrize(
    ("arguments", "options", "last"),
    [
        ((GatedDeltaNet, BF16, 16, 128), {}, 301),
        ((GatedDeltaNet, FP16, 6, 64), {"memory_positions": "none"}, 0),
        ((Mamba2, BF16, 6, 64), {}, 40),
        ((DeltaNet, FP16, 4, 128), {}, 511),
        ((GatedDeltaNet, BF16, 4, 64), {"slots": 32}, 301),
    ],
)
def test_what_is_compiled_ahead_is_what_a_prompt_launches(asked, arguments, options, last):
    dtype = arguments[1]
    store = make_store(*arguments, **options)
    really(store, dtype, [PIECE] * 7 + [last] * (last > 0))
    launched = set(asked)
    asked.clear()
    lengths = first_prompt.pieces(7 * PIECE + last, PIECE, store.window.capacity)
    with ahead.noting() as noted:
        first_prompt.read(store, torch.device("cpu"), dtype, 1, lengths)
    assert not asked, "launches are noted, not made"
    for launch in noted:
        launch.kernel.function.warmup(*launch.args, grid=(1,), **launch.options)
    assert set(asked) == launched
    assert {name.rpartition(".")[2] for name, _ in launched} >= {"_join", "_read_chunks", "_turn"}


def test_no_length_of_a_prompt_needs_its_own_kernels(asked):
    """Sizes that depend on it are not compiled into them; a last piece joins fewer parts of the attention."""
    found = []
    for last in (304, 301, 77, 48):
        asked.clear()
        store = make_store(GatedDeltaNet, BF16, 6, 64)
        with ahead.noting() as noted:
            first_prompt.read(store, torch.device("cpu"), BF16, 1, [PIECE] * 6 + [last])
        for launch in noted:
            launch.kernel.function.warmup(*launch.args, grid=(1,), **launch.options)
        found.append(set(asked))
    assert all(keys == found[0] for keys in found)
    names = [name.rpartition(".")[2] for name, _ in found[0]]
    assert names.count("_join") == 3 and len(names) - 3 == len({*names} - {"_join"})


def test_what_is_compiled_beside_inductor_is_what_a_step_launches(asked):
    from ahn_layers.huggingface.compiled.region import launches_of
    from ahn_layers.huggingface.compiled.triton_matvec import matvec
    from ahn_layers.ops.decode.triton_decode import slot_attention

    def step(x, norm, weights, biases, k, v, seen):
        q = matvec(2 * x, weights, biases, norm, 1e-6, False).narrow(0, 0, 4 * 64).view(1, 4, 1, 64)
        out = slot_attention(q, q, k, v, seen, SINKS, 0.1)
        return matvec(out.view(1, 1, -1), weights[:1], biases[:1], None, 0.0, False, x)

    def backend(graph, _):
        runs.append(launches_of(graph.graph))
        return graph.forward

    runs, weights = [], [torch.randn(n, 256, dtype=BF16) for n in (256, 24, 40)]
    k, v = torch.randn(2, 1, GROUPS, WINDOW + SINKS, 64, dtype=BF16)
    given = (
        torch.randn(1, 1, 256, dtype=BF16),
        weights[0][3].clone(),
        weights,
        [None, None, weights[0][0, :40].clone()],
    )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(*given, k, v, torch.tensor([7]))
    torch._dynamo.reset()
    launched = set(asked)
    asked.clear()
    ((run, devices),) = runs
    with ahead.noting() as noted:
        run()
    for launch in noted:
        launch.kernel.function.warmup(*launch.args, grid=(1,), **launch.options)
    assert set(asked) == launched and devices == {torch.device("cpu")}
    assert sorted(name.rpartition(".")[2] for name, _ in launched) == [
        "_attend_to_part", "_join_parts", "_matvec", "_matvec"
    ]  # fmt: skip


class Function:
    """Stands for what ``triton.jit`` makes: compiles when it is let, and remembers."""

    def __init__(self, error=None):
        self.may_compile, self.error, self.compiled, self.launched = threading.Event(), error, [], []

    def warmup(self, *args, grid, **options):
        assert self.may_compile.wait(60)
        if self.error:
            raise self.error
        self.compiled.append(args)
        return SimpleNamespace(run=None)

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, len(self.compiled)))


@pytest.mark.parametrize("error", [None, RuntimeError("ptxas")])
def test_a_launch_waits_for_what_is_being_compiled(error):
    function = Function(error)
    kernel = ahead.Kernel(function)

    def launches():
        u = torch.empty(4, 8, dtype=FP16)
        for number in (1, 1, 2):
            kernel[3,](u[1:], number)
        raise RuntimeError("what goes wrong here is not heard of")

    ahead.compile_ahead(launches, torch.device("cpu"))
    thread = threading.Thread(target=lambda: kernel[5,]("tensor"))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not function.launched
    function.may_compile.set()
    thread.join(60)
    pointer = ahead.Pointer(FP16, 16)
    assert sorted(function.compiled, key=str) == ([] if error else [(pointer, 1), (pointer, 2)])
    assert function.launched == [((5,), ("tensor",), 0 if error else 2)] and not kernel.coming


def test_hooks_and_weights_of_the_model_are_left_alone():
    store = make_store(GatedDeltaNet, BF16, 4, 64)
    heard = []
    store.compressor.a_proj.register_forward_hook(lambda *given: heard.append(given))
    before = {name: u.clone() for name, u in store.state_dict().items()}
    with ahead.noting():
        first_prompt.read(store, torch.device("cpu"), BF16, 1, [PIECE])
    assert not heard
    assert all(torch.equal(u, before[name]) for name, u in store.state_dict().items())
