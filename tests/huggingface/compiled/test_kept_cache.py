"""A kept cache decodes as one CUDA graph, turn after turn. Needs a GPU."""

# ruff: noqa: F811 - fixtures are imported

import importlib

import pytest
import torch

from .graphs import models  # noqa: F401 - a fixture: the library without checks of shapes, which cannot be traced
from .test_step_graph import generate as plain_generate
from .test_step_graph import recorded, tokens  # noqa: F401 - a fixture

pytestmark = pytest.mark.gpu
NEW = 40
"""New tokens of a turn: enough for a step to be recorded unasked."""
ONE_STEP_EACH = NEW - 1 - 1
"""Replays of a turn: the prompt gives the first token, the first step compiles."""


def make(models, **options):
    return models.retrofitted("qwen3", torch.float32, **options).cuda()


def generate(model, ids, count, **options):
    """With a mask, since any token may come."""
    return plain_generate(model, ids, count, **{"attention_mask": torch.ones_like(ids)} | options)


def chat(model, cache, rows=1, first=20, turns=3, **options):
    """A conversation; the text and the bytes held after each turn."""
    ids = tokens(rows, first)
    for turn in range(turns):
        torch.manual_seed(turn)
        ids = generate(model, ids, NEW, cache=cache, **options)
        yield ids, cache.nbytes, cache.get_seq_length()
        ids = torch.cat((ids, tokens(rows, 5, seed=turn)), dim=1)


@pytest.mark.parametrize("window", [6, 400], ids=["full", "not full"])
@pytest.mark.parametrize("rows, options", [(1, {}), (2, {"do_sample": True, "top_k": 4})], ids=["greedy", "sampled"])
def test_turns_are_replayed_and_those_of_eager_steps(rows, options, window, models, recorded):
    """Bytes and lengths too; and nothing is compiled from the second turn on, nor for another cache."""
    model, ahn = make(models, window_size=window), importlib.import_module("ahn_layers")
    expected = list(chat(model, ahn.HippocampalCache(), rows, disable_compile=True, **options))
    assert not recorded
    list(chat(model, ahn.HippocampalCache(), rows, turns=1, **options))
    recorded.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for turn, (one, other) in enumerate(
                zip(chat(model, ahn.HippocampalCache(), rows, **options), expected, strict=True)
            ):
                assert torch.equal(one[0], other[0]) and one[1:] == other[1:], f"turn {turn}"
                assert len(recorded) == ONE_STEP_EACH and len(set(recorded)) == 1
                recorded.clear()


def test_a_short_conversation_and_a_long_one_share_code(models, recorded):
    """Rows of the same number, whatever they have read before; joined rows and the cache that is returned too."""
    model, ahn = make(models, window_size=60), importlib.import_module("ahn_layers")
    caches = [ahn.HippocampalCache() for _ in range(2)]
    texts = [generate(model, tokens(1, length), NEW, cache=c) for length, c in zip((5, 200), caches, strict=True)]
    joined = ahn.HippocampalCache.join(caches)
    short, long = (text.shape[1] for text in texts)
    ids = torch.cat((torch.nn.functional.pad(texts[0], (long - short, 0)), texts[1]), dim=0)
    mask = torch.ones_like(ids)
    mask[0, : long - short] = 0
    found = generate(model, ids, NEW, cache=joined, attention_mask=mask)
    for i, cache in enumerate(caches):
        alone = generate(model, texts[i], NEW, cache=cache, disable_compile=True)
        assert torch.equal(found[i, -NEW:], alone[0, -NEW:])
    recorded.clear()
    out = generate(model, tokens(2, 9), NEW, return_dict_in_generate=True)
    assert len(recorded) == ONE_STEP_EACH
    cache = out[importlib.import_module("ahn_layers.huggingface.decoder").CACHE]
    assert cache.get_seq_length() == 9 + NEW - 1 and not cache.is_compileable
    assert torch.equal(out.sequences, generate(model, tokens(2, 9), NEW, disable_compile=True))


def test_slots_are_kept_alike(models, recorded):
    ahn = importlib.import_module("ahn_layers")
    model = make(models, eviction=ahn.SalientSlots(8, score="value_norm", rate=0.1))
    expected = list(chat(model, ahn.HippocampalCache(), disable_compile=True))
    for one, other in zip(chat(model, ahn.HippocampalCache()), expected, strict=True):
        assert torch.equal(one[0], other[0]) and one[1:] == other[1:]
    assert len(recorded) == 3 * ONE_STEP_EACH


def test_a_row_that_finishes_early_leaves_no_pads(models):
    model, ahn, ids = make(models, window_size=30), importlib.import_module("ahn_layers"), tokens(3, 8)
    free = generate(model, ids, NEW, disable_compile=True)
    end = int(free[0, 8 + 4])
    caches, options = [], {"eos_token_id": end, "pad_token_id": 0}
    texts = []
    for how in ({}, {"disable_compile": True}):
        caches.append(ahn.HippocampalCache())
        texts.append(generate(model, ids, NEW, cache=caches[-1], **options, **how))
    assert torch.equal(*texts)
    mine, its = (cache.layers[0] for cache in caches)
    assert torch.equal(mine.state.seen, its.state.seen) and mine.padding == its.padding
    assert int(mine.state.seen[0]) < int(mine.state.seen.max()) and caches[0].nbytes == caches[1].nbytes


@pytest.mark.parametrize("window", [6, 400], ids=["full", "not full"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_end_between_replays(error, window, models, recorded):
    """The cache goes on with the tokens that it holds."""
    model, ahn = make(models, window_size=window), importlib.import_module("ahn_layers")
    ids, cache, other = tokens(1, 20), ahn.HippocampalCache(), ahn.HippocampalCache()
    text = generate(model, ids, NEW, cache=other, disable_compile=True)

    def stop(seen, scores):
        if seen.shape[1] == 30:
            raise error
        return scores

    with pytest.raises(error):
        generate(model, ids, NEW, cache=cache, logits_processor=[stop])
    assert len(recorded) > 5 and cache.get_seq_length() == 30
    rest = generate(model, text[:, :31], text.shape[1] - 31, cache=cache)
    assert torch.equal(rest, text) and cache.nbytes == other.nbytes


def test_crop_and_copies_between_turns(models, recorded, tmp_path):
    model, ahn = make(models, window_size=400), importlib.import_module("ahn_layers")
    cache, ids = ahn.HippocampalCache(), tokens(1, 20)
    text = generate(model, ids, NEW, cache=cache)
    cache.save(tmp_path / "kept")
    cache.crop(-30)
    again = generate(model, text[:, : text.shape[1] - 30], 30 + 5, cache=cache)
    assert torch.equal(again[:, : text.shape[1]], text)
    loaded = ahn.HippocampalCache.load(tmp_path / "kept", ids.device)
    assert torch.equal(generate(model, text, NEW, cache=loaded), generate(model, text, NEW, disable_compile=True))


def test_memory_is_given_back(models):
    """A conversation that fits the window holds no full window between turns."""
    model, ahn = make(models, window_size=20_000), importlib.import_module("ahn_layers")
    cache, ids = ahn.HippocampalCache(), tokens(1, 20)
    generate(model, ids, NEW, cache=ahn.HippocampalCache())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generate(model, ids, NEW, cache=cache)
    full = sum(2 * 20_000 * layer.keys.shape[1] * layer.keys.shape[3] * 4 for layer in cache.layers)
    assert torch.cuda.memory_allocated() - before < full / 10
