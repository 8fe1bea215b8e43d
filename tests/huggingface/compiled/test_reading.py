"""Long prompts as they are read on a GPU, here on a CPU: layers compiled, once for all of them, and no masks."""

import copy
import importlib
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from .graphs import Graphs, fresh, models  # noqa: F401 - fixtures: what is compiled cannot be checked for shapes

PIECE, WINDOW, SINKS = 8, 22, 2
"""Three pieces fill the window."""
LONG = 6 * PIECE + 3
FAMILIES = ["llama", "qwen2", "qwen3", "mistral_window", "phi3", "gemma2", "gemma3", "olmo2", "gpt_neox", "glm"]


@pytest.fixture
def reading(models, monkeypatch):  # noqa: F811
    """Makes ``generate`` read as on a GPU, and counts what is compiled; the prompts that a twin reads are listed."""
    prefill, region, module = (
        importlib.import_module(f"ahn_layers.huggingface.{name}")
        for name in ("prefill", "compiled.region", "compiled.reading")
    )
    graphs, make, choose = Graphs(), region.compiled_region, module.Reader.reading_model
    graphs.twins, graphs.use = [], graphs.backend

    def chosen(self, length, *args):
        reads = choose(self, length, *args)
        graphs.twins += [length] * (reads is not self.model)
        return reads

    monkeypatch.setattr(prefill, "PREFILL_CHUNK", PIECE)
    monkeypatch.setattr(module, "WORTH_COMPILING", 4)
    monkeypatch.setattr(module.Reader, "serves", lambda self: True)
    monkeypatch.setattr(module.Reader, "reading_model", chosen)
    monkeypatch.setattr(module, "compiled_region", lambda **options: make(backend=graphs.use, **options))
    return graphs


def retrofitted(models, name="llama", window_size=WINDOW, **options):  # noqa: F811
    """A model, of six layers if all of them get a memory."""
    many = {"num_hidden_layers": 6} if name in FAMILIES and len(models.FAMILIES[name].layers) > 1 else {}
    return models.retrofitted(model=models.base(name, **many), window_size=window_size, num_sinks=SINKS, **options)


def compare(models, model, ids, past=None, atol=1e-5, **options):  # noqa: F811
    """Logits against those of a prompt whose pieces the caller asks for, which are read as they always were."""
    options = {"count": 3, "return_dict_in_generate": True, "output_logits": True} | options
    given = [{} if past is None else {"cache": past.clone()} for _ in range(2)]
    expected = models.generate(model, ids, prefill_chunk_size=PIECE, **given[0], **options)
    found = models.generate(model, ids, **given[1], **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits or (), expected.logits or (), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)  # kept as float32
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_compiled_once(name, models, reading):  # noqa: F811
    """However many there are: for every piece, for a second prompt and for another cache."""
    model = retrofitted(models, name, 6 if "window" in name or "gemma" in name else WINDOW)
    keys, static = list(model.state_dict()), {"cache_implementation": "static"}
    some = len(model.hippocampus.layers) < model.config.num_hidden_layers  # cannot use a static cache
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        for length, options in ((LONG, {}), (LONG + 9, {} if some else static), (8 * PIECE, {})):
            compare(models, model, models.tokens(1, length), **options)
            assert reading.count == 1 and reading.twins.pop() == length
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_compiled_for_real(name, models, reading):  # noqa: F811
    reading.use = "inductor"
    compare(models, retrofitted(models, name), models.tokens(1, LONG), atol=1e-4)  # norms are computed in float32
    assert reading.twins == [LONG]


def test_layers_are_compiled_once_it_is_worth_it(models, reading, monkeypatch):  # noqa: F811
    """A prompt or two cost less to read than to compile for."""
    module = importlib.import_module("ahn_layers.huggingface.compiled.reading")
    monkeypatch.setattr(module, "WORTH_COMPILING", 14)
    model, compiled = retrofitted(models), []
    for _ in range(3):
        compare(models, model, models.tokens(1, LONG))
        compiled.append(reading.count)
    assert compiled == [0, 0, 1] and reading.twins == [LONG] * 3
    compare(models, retrofitted(models), models.tokens(1, LONG))
    assert reading.count == 1, "each model counts for itself"


def test_the_mode_and_the_weights_of_the_moment_count(models, reading):  # noqa: F811
    ahn, model, ids = sys.modules["ahn_layers"], retrofitted(models), models.tokens(1, LONG)
    before = compare(models, model, ids).logits
    with ahn.window_only(model):
        found = compare(models, model, ids).logits
    assert not torch.equal(found[0], before[0]) and reading.count == 2
    with ahn.full_attention(model):
        models.generate(model, ids)
    assert len(reading.twins) == 2, "the base model reads as it always did"
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert torch.equal(compare(models, model, ids).logits[0], -before[0])
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(compare(models, again, ids).logits[0], -before[0])
    assert reading.count == 3, "compiled code is not copied"


def test_the_attention_of_the_base_model_is_not_asked(models, reading, monkeypatch):  # noqa: F811
    """It would make a mask; only the prompts within the window need it, to be bit-identical."""
    model, calls = retrofitted(models), []
    interface = importlib.import_module("ahn_layers.huggingface.interface")
    make = interface._base_mask
    monkeypatch.setattr(interface, "_base_mask", lambda *args: calls.append(args) or make(*args))
    models.generate(model, models.tokens(1, LONG), 3)
    assert not calls
    compare(models, model, models.tokens(1, WINDOW + SINKS))
    assert calls and reading.count == 1 and reading.twins == [LONG]


@pytest.mark.parametrize(
    "length, options, twins",
    [
        (WINDOW + SINKS, {}, 0),
        (4 * PIECE - 1, {}, 1),
        (LONG, {"disable_compile": True}, 1),
        (LONG, {"output_hidden_states": True}, 0),
        (LONG, {"use_cache": False}, 0),
        (LONG, {"prompt_lookup_num_tokens": 3}, 0),
    ],
    ids=str,
)
def test_what_is_not_compiled(length, options, twins, models, reading):  # noqa: F811
    model, ids = retrofitted(models), models.tokens(1, length)
    found = models.generate(model, ids, **options)
    assert (reading.count, len(reading.twins)) == (0, twins)
    assert torch.equal(found, models.generate(model, ids, prefill_chunk_size=PIECE))


def test_several_sequences(models, reading):  # noqa: F811
    model, ids = retrofitted(models), models.tokens(3, LONG)
    compare(models, model, ids)
    compare(models, model, ids[:1], num_beams=3, output_logits=False)
    assert reading.count == 1 and reading.twins == [LONG] * 2
    ids[1, :11] = 0
    compare(models, model, ids, attention_mask=(ids != 0).long())
    assert reading.count == 1 and reading.twins == [LONG] * 2, "padding is read as it always was"


def test_a_cache_that_holds_tokens(models, reading):  # noqa: F811
    model, ids = retrofitted(models), models.tokens(1, LONG)
    cache = sys.modules["ahn_layers"].HippocampalCache()
    models.generate(model, ids[:, :6], 1, cache=cache)
    compare(models, model, ids, cache, attention_mask=torch.ones_like(ids))
    compare(models, model, ids[:, 6:], cache)  # the new tokens alone
    assert reading.twins[:1] == [LONG]


def test_layers_that_cannot_be_compiled_run_as_they_are(models, reading):  # noqa: F811
    def failing(graph, inputs):
        raise RuntimeError("no compiler here")

    reading.use, model, ids = failing, retrofitted(models), models.tokens(1, LONG)
    with pytest.warns(UserWarning, match="runs uncompiled") as said:
        compare(models, model, ids)
    assert len([w for w in said if "runs uncompiled" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(models, model, ids)


def test_too_many_shapes_run_as_they_are(models):  # noqa: F811
    region = importlib.import_module("ahn_layers.huggingface.compiled.region")
    run, layer = region.compiled_region(dynamic=False, fullgraph=True, backend="eager"), torch.nn.Linear(4, 4)
    inputs = [torch.randn(length, 4) for length in range(1, 6)]
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(UserWarning, match="runs uncompiled"):
        found = [run(layer, x) for x in inputs]
    assert all(torch.equal(one, layer(x)) for one, x in zip(found, inputs, strict=True))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "lfm2", "smollm3", "gpt2", "cohere2", "llama4"])
@pytest.mark.filterwarnings("ignore:.*runs uncompiled", "ignore:.*trained length")
def test_every_family_reads_as_before(name, models, reading):  # noqa: F811
    model = retrofitted(models, name, 6)
    compare(models, model, models.tokens(1, LONG))
    assert len(reading.twins) == (name != "gpt2"), "where sinks cannot be kept near, there may be a warning to give"


def test_threads_do_not_meet(models, reading):  # noqa: F811
    model, texts = retrofitted(models), [models.tokens(1, LONG + i, seed=i) for i in range(4)]
    expected = [models.generate(model, ids, prefill_chunk_size=PIECE) for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: models.generate(model, ids, disable_compile=True), texts * 2))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 2, strict=True))
    assert len(reading.twins) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("piece, window", [(64, 190), (512, 2046)], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_on_the_gpu(name, piece, window, models, monkeypatch):  # noqa: F811
    """In half precision: no farther from the exact logits than what is read uncompiled, but for rounding."""
    prefill, module = (importlib.import_module(f"ahn_layers.huggingface.{u}") for u in ("prefill", "compiled.reading"))
    monkeypatch.setattr(prefill, "GPU_PREFILL_CHUNK", piece)
    monkeypatch.setattr(module, "WORTH_COMPILING", 4)
    sizes = {"head_dim": 64, "hidden_size": 256, "max_position_embeddings": 4096}
    model = models.retrofitted(model=models.base(name, torch.bfloat16, **sizes), window_size=window, num_sinks=2).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25 if parameter.ndim > 1 else 1)
    ids = models.tokens(1, 6 * piece + 3)
    options = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        exact = copy.deepcopy(model).cpu().double()(input_ids=ids, use_cache=False).logits[0, -1]
    before = models.generate(model, ids.cuda(), 1, prefill_chunk_size=piece, **options).logits[0][0].double().cpu()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled")
        found = models.generate(model, ids.cuda(), 1, **options).logits[0][0].double().cpu()
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = models.generate(model, ids.cuda(), 1, **options).logits[0][0].double().cpu()
    assert model._prefill.reader._region is not None and torch.equal(found, again)
    assert (found - exact).norm() < 2 * (before - exact).norm() + 1e-3 * exact.norm()
