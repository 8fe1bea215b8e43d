"""Decoding with a static cache: one graph, one piece of code for all layers, for any rows."""

# ruff: noqa: F811 - fixtures are imported

import contextlib
import importlib
import sys

import pytest
import torch
from transformers import CompileConfig, StaticCache

from ..recorded import Rerun
from .graphs import Graphs, fresh, models  # noqa: F401 - fixtures


def compiling(backend):
    """What ``generate`` does by itself on a GPU: compile the decoding step."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize(
    "name, switch", [("llama", "memory"), ("qwen3", "memory"), ("mistral_window", "memory"), ("llama", "window_only")]
)
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


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt_neox"])
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


def test_layers_with_other_slots_are_compiled_apart(models, steps):
    """Once for each number of slots, not for each layer."""
    ahn = sys.modules["ahn_layers"]
    slots = {i: ahn.SalientSlots(12 if i in (1, 2, 6) else 3, score="value_norm", rate=0.01) for i in range(8)}
    model, graphs = models.retrofitted(model=models.base("llama", num_hidden_layers=8), eviction=slots), Graphs()
    steps(model, graphs.backend)
    with torch._dynamo.config.patch(recompile_limit=2):
        for ids in (models.tokens(2, 3), models.tokens(2, 40)):
            out = models.generate(model, ids, models.CAPACITY, **compiling("eager"))
            assert torch.equal(out, models.generate(model, ids, models.CAPACITY)) and graphs.count == 2


@pytest.mark.parametrize("window", [6, 60], ids=["full", "not full"])
def test_an_end_between_compiled_layers_of_a_kept_cache(window, models, steps, monkeypatch):
    """The state of before, or a refusal: compiled code takes no notes, what calls it does."""
    ahn, model, ids = (
        importlib.import_module("ahn_layers"),
        models.retrofitted(window_size=window),
        models.tokens(1, 20),
    )
    steps(model, Graphs().backend)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, inputs, options: True)
    cache, calls, place = ahn.HippocampalCache(), [], model.model.norm

    def stop(*_):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with place.register_forward_hook(stop), pytest.raises(KeyboardInterrupt):
        models.generate(model, ids, 40, cache=cache, attention_mask=torch.ones_like(ids))
    if window == 6:
        with pytest.raises(RuntimeError, match="this cache is unusable"):
            cache.clone()
        return
    other = ahn.HippocampalCache()
    models.logits(model, ids, 20, other)
    assert cache.get_seq_length() == 20
    assert torch.equal(*(models.logits(model, models.tokens(1, 4), 2, one) for one in (cache, other)))


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
