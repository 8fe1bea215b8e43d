"""``torch.compile``: whole graphs without a break, and one graph for all of decoding with a static cache."""

import contextlib
import copy
import importlib
import sys

import pytest
import torch
from torch import nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from ...methods import NAMES

SIZE, HEADS, GROUPS = 8, 4, 2


@pytest.fixture(scope="module")
def models():
    """``tests.models`` over a copy of the library whose shapes are not checked: the checks cannot be traced."""
    ours = [name for name in sys.modules if name.split(".")[0] == "ahn_layers" or name == "tests.models"]
    checked, finders = {name: sys.modules.pop(name) for name in ours}, sys.meta_path[:]
    sys.meta_path[:] = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
    try:
        yield importlib.import_module("tests.models")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "ahn_layers"]:
            del sys.modules[name]
        sys.modules.update(checked)
        sys.meta_path[:] = finders
        sys.modules["tests"].models = checked.get("tests.models")
        if "ahn_layers.huggingface.saved_model" in checked:  # transformers' tables name the classes of the copy
            checked["ahn_layers.huggingface.saved_model"].register()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what it is given, and counts it."""

    def __init__(self):
        self.count = 0
        self.backend = self._compile

    def _compile(self, graph, _):
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo):
        """Configs are copied, the counter is not."""
        return self


def store_and_tokens(ahn, compressor, length=30):
    memory = None if compressor is None else ahn.Compressor.by_name[compressor](16, HEADS, SIZE, num_kv_heads=GROUPS)
    store = ahn.MemoryStore(ahn.Window(5, num_sinks=2), memory).double()
    for parameter in store.parameters():
        nn.init.normal_(parameter, std=0.5)
    sizes = [(2, HEADS, length, SIZE), (2, GROUPS, length, SIZE), (2, GROUPS, length, SIZE), (2, length, 16)]
    return store, [torch.randn(size, dtype=torch.float64) for size in sizes]


def columns(tensors, start, stop):
    return [u[..., start:stop, :] for u in tensors]


def same_states(one, other):
    assert one.description() == other.description()
    for name, u in one.tensors().items():
        torch.testing.assert_close(u, other.tensors()[name], rtol=0, atol=1e-12)


# --- stores and custom blocks


def test_compiled_models_notice_packed_texts(models):
    """They read one text a row, and assert that there is no second."""
    model, row = models.retrofitted(), models.tokens(1, 30)
    compiled = torch.compile(model, backend="eager")
    positions = torch.cat((torch.arange(20), torch.arange(10)))[None]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="begin again"):
            compiled(row, position_ids=positions, use_cache=False)
        assert compiled(row, position_ids=torch.arange(30)[None], use_cache=False).logits.isfinite().all()


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.7 cannot trace einops")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("compressor", [*NAMES, None])
def test_a_store_is_one_graph(compressor, padded, models):
    ahn = sys.modules["ahn_layers"]
    store, tokens = store_and_tokens(ahn, compressor)
    valid = torch.rand(2, 30) < 0.7 if padded else torch.ones(2, 30, dtype=torch.bool)
    compiled = torch.compile(store, fullgraph=True, dynamic=False, backend="eager")
    state = expected_state = None
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 21), (21, 30)):
            mask = {"valid": valid[:, start:stop]} if padded else {}
            out, state = compiled(*columns(tokens, start, stop), state, **mask)
            expected, expected_state = store(*columns(tokens, start, stop), expected_state, **mask)
            if padded:  # compiled code does not cut a call where real tokens go on after padding
                follows = (mask["valid"].flip(1).cumsum(dim=1) == 0).flip(1)
                shown = (mask["valid"] | follows)[:, None, :, None]
                out, expected = out.masked_fill(~shown, 0), expected.masked_fill(~shown, 0)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    same_states(state, expected_state)


def test_gradients_of_a_compiled_store(models):
    store, tokens = store_and_tokens(sys.modules["ahn_layers"], "GatedDeltaNet")
    gradients = []
    for run in (store, torch.compile(store, fullgraph=True, backend="aot_eager_decomp_partition")):
        out, _ = run(*tokens)
        gradients.append(torch.autograd.grad(out.square().sum(), list(store.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Block(nn.Module):
    """A user's block."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, 16)

    def forward(self, x, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def test_a_custom_block_is_one_graph(models):
    ahn = sys.modules["ahn_layers"]
    memory = ahn.GatedDeltaNet(16, HEADS, SIZE)
    layer = ahn.HippocampalAttention(Block(), ahn.MemoryStore(ahn.Window(5, num_sinks=2), memory)).double()
    nn.init.normal_(memory.o_proj.weight)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="eager")
    state = expected_state = None
    with torch.no_grad():
        for part in x.split([20, 1, 9], dim=1):
            out, state = compiled(part, state)
            expected, expected_state = layer(part, expected_state)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    same_states(state, expected_state)


# --- models


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_an_uncached_forward_is_one_graph(name, models):
    model, ids = models.retrofitted(name), models.tokens(2, 3 * models.CAPACITY)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    with torch.no_grad():
        out = compiled(input_ids=ids, use_cache=False).logits
    assert graphs.count == 1
    torch.testing.assert_close(out, models.logits(model, ids), rtol=0, atol=1e-12)


def test_gradients_of_a_compiled_model(models):
    ahn = sys.modules["ahn_layers"]
    model, ids = models.retrofitted(), models.tokens(2, 3 * models.CAPACITY)
    memory = [parameter for _, parameter in ahn.adapter_parameters(model)]
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")):
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, memory))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # norms are float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_as_they_do_without(checkpointing, models):
    """Teacher and student, whose first layer gets no gradient; the second window makes code for all the others."""
    distillation, graphs = importlib.import_module("ahn_layers.distillation"), Graphs()
    model, ids = models.retrofitted(), models.tokens(2, 9 * models.CAPACITY)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    memory = distillation.freeze_base(model)

    def gradients(window, **options):
        with distillation.use_window(model, *window):
            found = distillation.distillation_loss(model, ids, ce_weight=0.5, **options)
            return torch.autograd.grad(found.loss, memory)

    windows = [(6, 2), (12, 3), (20, 5), (33, 3)]
    expected = [gradients(window) for window in windows]
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False, recompile_limit=8):  # put back at the end
        distillation.compile_layers(model, fullgraph=not checkpointing, backend=graphs.backend)
        counts = []
        for window, others in zip(windows, expected, strict=True):
            for one, other in zip(gradients(window), others, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # norms are float32
            counts.append(graphs.count)
        assert counts[0] == 3 and counts[1] <= 5 and counts[1:] == counts[1:2] * 3
        gradients((30, 4), layer_weight=0.3)  # eager: hooks tell layers apart
        distillation.align_layers(model, ids)
        assert graphs.count == counts[-1]
    with pytest.raises(ValueError, match="Linear has no HippocampalAttention: call retrofit"):
        distillation.compile_layers(nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", ["GatedDeltaNet", "Mamba2"])
def test_compiled_layers_on_the_gpu(compressor, models):
    """The fused kernels inside compiled code: about as far from float32 as without, for odd lengths too."""
    ahn, distillation = sys.modules["ahn_layers"], importlib.import_module("ahn_layers.distillation")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).cuda().bfloat16()
    model = ahn.retrofit(base, ahn.Compressor.by_name[compressor], window_size=200, num_sinks=8)
    memory = distillation.freeze_base(model)
    for parameter in memory:
        parameter.data += 0.05 * torch.randn_like(parameter)
    exact = copy.deepcopy(model).float()
    ids, goal = torch.randint(64, (2, 1504), device="cuda"), torch.randn(2, 1504, 256, device="cuda")

    def gradients(model, length, window):
        with distillation.use_window(model, *window):
            x = model.get_input_embeddings()(ids[:, :length]).detach().requires_grad_()
            hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        names, given = zip(*ahn.adapter_parameters(model), strict=True)
        found = torch.autograd.grad((hidden.float() * goal[:, :length]).sum(), [x, *given])
        return dict(zip(["x", *names], found, strict=True))

    cases = [(1504, (248, 8)), (1504, (500, 12)), (1500, (248, 8)), (1504, (700, 4)), (1504, (247, 8))]
    expected = [gradients(exact, *case) for case in cases]
    eager = [gradients(model, *case) for case in cases]
    errors = {}
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False, recompile_limit=8):
        distillation.compile_layers(model, fullgraph=True)
        for case, right, others in zip(cases, expected, eager, strict=True):
            for name, found in gradients(model, *case).items():
                near, far = (float((u - right[name]).norm() / right[name].norm()) for u in (others[name], found))
                if far > 3 * near + 0.05:
                    errors[case, name] = (near, far)
    assert not errors


def compiling(backend):
    """What ``generate`` does by itself on a GPU: compile the decoding step."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("switch", ["memory", "window_only"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_decoding_with_a_static_cache_is_one_graph(name, switch, models):
    """Across the window, in a second call, for another prompt and for padded rows."""
    ahn = sys.modules["ahn_layers"]
    model, graphs, count = models.retrofitted(name), Graphs(), models.CAPACITY + 6
    texts = [models.tokens(2, 3), models.tokens(2, 3, seed=1), models.tokens(2, models.CAPACITY), models.tokens(2, 30)]
    padded = models.tokens(2, 12, seed=2)
    padded[1, :9] = 0
    mode = ahn.window_only(model) if switch == "window_only" else contextlib.nullcontext()
    with mode, torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (*texts, padded):
            mask = {"attention_mask": (ids != 0).long()}
            out = models.generate(model, ids, count, **mask, **compiling(graphs.backend))
            assert torch.equal(out, models.generate(model, ids, count, **mask)), f"{ids.shape[1]} tokens"
            assert graphs.count == 1


class Rerun:
    """In place of a CUDA graph: the step itself."""

    def __init__(self, function, leaves, structure):
        self.function, self.structure = function, structure
        self.static = [u.clone() if isinstance(u, torch.Tensor) else u for u in leaves]

    def __call__(self, leaves):
        for mine, new in zip(self.static, leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(new)
        return self.function(**torch.utils._pytree.tree_unflatten(self.static, self.structure))


@pytest.fixture
def steps(models, monkeypatch):
    """Makes ``generate`` step as on a GPU, with layers compiled by a backend; returns how to."""
    graph, region = (
        importlib.import_module(f"ahn_layers.huggingface.compiled.{name}") for name in ("step_graph", "region")
    )
    monkeypatch.setattr(graph, "Recording", Rerun)

    def use(model, backend):
        call = model.get_compiled_call
        monkeypatch.setattr(call.recorder, "_region", region.compiled_region(dynamic=False, backend=backend))
        monkeypatch.setattr(type(call), "serves", lambda self, config: True)

    return use


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window", "gpt_neox"])
def test_layers_are_compiled_once(name, models, steps):
    """However many there are; for any prompt, padded or not, and for a second generation; without the memory again."""
    ahn = sys.modules["ahn_layers"]
    model, graphs, count = models.retrofitted(model=models.base(name, num_hidden_layers=11)), Graphs(), models.CAPACITY
    keys = list(model.state_dict())
    steps(model, graphs.backend)
    padded = models.tokens(2, 12, seed=2)
    padded[1, :9] = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (models.tokens(2, 3), models.tokens(2, 3, seed=1), models.tokens(2, 30), padded):
            mask = {"attention_mask": (ids != 0).long()}
            out = models.generate(model, ids, count, **mask, **compiling("eager"))
            assert torch.equal(out, models.generate(model, ids, count, **mask)), f"{ids.shape[1]} tokens"
            assert graphs.count == 1
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(1)
        out = models.generate(model, padded, count, **options, **compiling("eager"))
        torch.manual_seed(1)
        assert torch.equal(out, models.generate(model, padded, count, **options))
    with ahn.window_only(model):
        out = models.generate(model, padded, count, **compiling("eager"))
        assert torch.equal(out, models.generate(model, padded, count))
    assert graphs.count == 2 and list(model.state_dict()) == keys


def test_layers_that_cannot_be_compiled_run_as_they_are(models, steps):
    model, ids = models.retrofitted(), models.tokens(2, 3)

    def failing(graph, inputs):
        raise RuntimeError("no compiler here")

    steps(model, failing)
    with pytest.warns(UserWarning, match="runs uncompiled"):
        out = models.generate(model, ids, 12, **compiling("eager"))
    assert torch.equal(out, models.generate(model, ids, 12))


def test_two_static_caches_in_turn(models, steps):
    model, graphs = models.retrofitted(), Graphs()
    steps(model, graphs.backend)
    texts = [models.tokens(2, 5), models.tokens(2, 9, seed=3)]
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in texts]
    for _ in range(3):
        for i, cache in enumerate(caches):
            out = models.generate(model, texts[i], 7, cache=cache, compile_config=compiling("eager")["compile_config"])
            assert torch.equal(out, models.generate(model, texts[i], 7))
            texts[i] = torch.cat((out, models.tokens(2, 2, seed=i)), dim=1)
    assert graphs.count == 1


def test_a_static_cache_of_ones_own(models):
    """A compiled step by hand, far beyond the length that the cache was made for; reset, it serves the next text."""
    model, graphs, ids = models.retrofitted(), Graphs(), models.tokens(2, 40)
    step = torch.compile(model, fullgraph=True, backend=graphs.backend)
    cache, expected = StaticCache(config=model.config, max_cache_len=16), models.logits(model, ids)
    position = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            model(input_ids=ids[:, :5], cache=cache, use_cache=True)
            position.fill_(5)
            for t in range(5, 40):
                out = step(input_ids=ids[:, t : t + 1], position_ids=position, cache=cache, use_cache=True)
                torch.testing.assert_close(out.logits[:, 0], expected[:, t], rtol=0, atol=1e-9)
                position += 1
            cache.reset()
    assert graphs.count == 1


def test_rows_of_a_static_cache_are_replaced_within_one_graph(models):
    """A batch of fixed size decodes whatever rows come and go."""
    ahn = importlib.import_module("ahn_layers")
    model, caches = models.retrofitted(), []
    for i, length in enumerate((1, 5, 30)):
        cache = ahn.HippocampalCache()
        models.logits(model, models.tokens(1, length, seed=i), length, cache)
        caches.append(cache)
    cache = ahn.HippocampalCache.join(caches, rows=4)
    ids, positions = models.tokens(4, 1), torch.tensor([1, 5, 30, 30]).unsqueeze(1)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for i in range(4):
            out = compiled(input_ids=ids, cache=cache, position_ids=positions + i, use_cache=True).logits
            cache.put(i, caches[i % 3])
            positions[i] = (1, 5, 30)[i % 3] - i - 1
        assert graphs.count == 1
        out = compiled(input_ids=ids, cache=cache, position_ids=positions + 4, use_cache=True).logits
        assert graphs.count == 1
        torch.testing.assert_close(out[3:], models.logits(model, ids[3:], 1, caches[0]), rtol=0, atol=1e-9)
        with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="without position_ids"):
            compiled(input_ids=ids, cache=cache, use_cache=True)
