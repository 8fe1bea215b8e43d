"""A kept cache has fixed addresses while ``generate`` decodes, and is otherwise what it would be: in every bit."""

# ruff: noqa: F811 - fixtures are imported

import threading

import pytest
import torch

from ahn_layers import GatedDeltaNet, HippocampalCache, MaxPooling, SalientSlots, Titans
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, generate, logits, tokens
from .keeping import WIDE, Look, chat, ones, pair, same  # noqa: F401 - a fixture
from .recorded import ENOUGH, Replay, recorded  # noqa: F401 - a fixture
from .test_turns import chat as chat_of_a_batch

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("first, window", [(2, 6), (CAPACITY, 6), (20, 6), (20, WIDE)])
@pytest.mark.parametrize("rows, options", [(1, {}), (3, {"do_sample": True, "top_k": 9})], ids=["greedy", "sampled"])
def test_turns_are_those_of_a_cache_that_grows(first, window, rows, options, pair):
    model, plain = pair(window_size=window)
    cache = HippocampalCache()
    found, seen = chat(model, cache, first=first, rows=rows, streamer=None, **options), []
    for one, other in zip(found, chat(plain, HippocampalCache(), first=first, rows=rows, **options), strict=True):
        assert torch.equal(one[0], other[0]) and same(one[1], other[1])
        seen.append((Replay.count, cache.nbytes == one[1].nbytes, cache.get_seq_length()))
    assert seen == [(8 * (turn + 1), True, one[0].shape[1] - 1 - 14 * (2 - turn)) for turn in range(3)]
    assert type(cache.get_seq_length()) is int


@pytest.mark.parametrize(
    "options",
    [
        {"compressor": MaxPooling},
        {"compressor": Titans},
        {"compressor": None},
        {"compressor": GatedDeltaNet, "eviction": SalientSlots(3, score="value_norm", rate=0.1)},
        {"name": "mistral_window"},
        {"name": "gpt2"},
    ],
    ids=lambda options: " ".join(getattr(u, "__name__", str(u)) for u in options.values()),
)
def test_with_other_memories_and_families(options, pair):
    model, plain = pair(**options)
    pairs = zip(chat(model, HippocampalCache()), chat(plain, HippocampalCache()), strict=True)
    assert all(torch.equal(one[0], other[0]) and same(one[1], other[1]) for one, other in pairs)
    assert Replay.count == 24


@pytest.mark.parametrize("left, window", [(0, 6), (4, 6), (4, WIDE)])
def test_rows_that_are_padded_and_finish_early(left, window, pair):
    model, plain = pair(window_size=window)
    prompts, mask = tokens(3, CAPACITY), torch.ones(3, CAPACITY, dtype=torch.long)
    mask[2, :left] = 0
    caches = HippocampalCache(), HippocampalCache()
    turns = [chat_of_a_batch(one, cache, prompts, mask) for one, cache in zip((model, plain), caches, strict=True)]
    finished = 0
    for (text, seen, *_), (other, other_seen, *_) in zip(*turns, strict=True):
        assert torch.equal(text, other) and torch.equal(seen, other_seen) and same(*caches)
        finished += not bool(seen.all())
    assert finished and Replay.count


def test_joined_rows(pair):
    model, plain = pair()
    caches, lengths, count = [], (5, 2 * CAPACITY), ENOUGH + 2
    for i, length in enumerate(lengths):
        cache = HippocampalCache()
        logits(plain, tokens(1, length, seed=i), length, cache)
        caches.append(cache)
    ids = torch.cat([tokens(1, lengths[1] + 2, seed=i) for i in range(2)])
    mask = torch.ones_like(ids)
    ids[0, : lengths[1] - 5] = mask[0, : lengths[1] - 5] = 0
    joined, other = HippocampalCache.join(caches), HippocampalCache.join(caches)
    found = [generate(one, ids, count, cache=c, attention_mask=mask) for one, c in ((model, joined), (plain, other))]
    assert torch.equal(*found) and same(joined, other) and joined.joined and Replay.count
    for row in range(2):
        assert same(joined.take(row), other.take(row))
    joined.put(0, caches[0])
    other.put(0, caches[0])
    assert same(joined, other)


@pytest.mark.parametrize("window", [6, WIDE])
def test_what_a_cache_can_do_it_can_do_afterwards(window, pair, tmp_path):
    model, plain = pair(window_size=window)
    layers, caches = None, (HippocampalCache(), HippocampalCache())
    for one, cache in zip((model, plain), caches, strict=True):
        logits(one, tokens(1, 3), 3, cache)
        layers = layers or list(cache.layers)
        ids = torch.cat((tokens(1, 3), tokens(1, 9, seed=1)), dim=1)
        generate(one, ids, 10, cache=cache, **ones(ids))
    assert all(mine is old for mine, old in zip(caches[0].layers, layers, strict=True))
    caches[0].save(tmp_path / "kept")
    assert same(HippocampalCache.load(tmp_path / "kept"), caches[1]) and same(caches[0].clone(), caches[1])
    for cache in caches:
        if window == WIDE:
            cache.crop(-4)
        else:
            with pytest.raises(RuntimeError, match="crop"):
                cache.crop(-4)
    assert same(*caches)
    outs = [logits(plain, tokens(1, 12, seed=3), (5, 6, 1), cache) for cache in caches]
    assert torch.equal(*outs) and same(*caches)
    caches[0].reset()
    assert caches[0].get_seq_length() == 0


def test_the_cache_that_generate_returns(pair):
    model, plain = pair()
    ids, options = tokens(2, 5), {"return_dict_in_generate": True, "output_logits": True}
    found, expected = (generate(one, ids, 10, **ones(ids), **options) for one in (model, plain))
    assert torch.equal(found.sequences, expected.sequences) and same(found[CACHE], expected[CACHE]) and Replay.count
    assert all(torch.equal(u, v) for u, v in zip(found.logits, expected.logits, strict=True))


def test_threads_with_a_cache_each(pair):
    model, plain = pair()
    caches, found = [HippocampalCache() for _ in range(3)], {}

    def run(i):
        found[i] = [ids for ids, _ in chat(model, caches[i], first=4 + i)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, cache in enumerate(caches):
        other = HippocampalCache()
        assert all(torch.equal(u, v) for u, (v, _) in zip(found[i], chat(plain, other, first=4 + i), strict=True))
        assert same(cache, other)


@pytest.mark.parametrize("inside", [(True, False, True), (False, True, False)])
def test_in_and_out_of_inference_mode(inside, pair):
    model, plain = pair()
    caches = HippocampalCache(), HippocampalCache()
    ids = [tokens(1, 5)] * 2
    for turn in inside:
        with torch.inference_mode(turn):
            ids = [
                generate(one, u, 10, cache=cache, **ones(u))
                for one, u, cache in zip((model, plain), ids, caches, strict=True)
            ]
        ids = [u.clone() for u in ids]
        assert torch.equal(*ids) and same(*caches)
    assert Replay.count == 24


def test_a_row_that_ends_in_padding(pair):
    model, plain = pair(window_size=WIDE)
    ids, mask, caches = tokens(2, 8), torch.ones(2, 8, dtype=torch.long), (HippocampalCache(), HippocampalCache())
    mask[1, 6:] = 0
    texts = []
    for one, cache in zip((model, plain), caches, strict=True):
        text = generate(one, ids, 10, cache=cache, attention_mask=mask)
        longer = torch.cat((text, tokens(2, 2)), dim=1)
        goes_on = torch.cat((mask, torch.ones(2, 12, dtype=torch.long)), dim=1)
        texts.append(generate(one, longer, 10, cache=cache, attention_mask=goes_on))
    assert torch.equal(*texts) and same(*caches) and Replay.count


def test_a_text_that_passes_the_trained_length_warns(pair):
    for model in pair():
        for layer in model.model.layers:
            layer.self_attn._warn_after = 14
        cache, ids = HippocampalCache(), tokens(1, 9)
        with pytest.warns(UserWarning, match="the text has passed the trained length of 14"):
            generate(model, ids, 10, cache=cache, **ones(ids))
    assert Replay.count


@pytest.mark.parametrize("options", [{"name": "gemma2"}, {"name": "falcon_h1"}, {"layers": [0, 2]}], ids=str)
def test_what_cannot_be_fixed_goes_on_as_ever(options, pair):
    model, plain = pair(**options)
    cache, other, ids = HippocampalCache(), HippocampalCache(), tokens(1, 9)
    for _ in range(2):
        texts = [generate(one, ids, 10, cache=c, **ones(ids)) for one, c in ((model, cache), (plain, other))]
        assert torch.equal(*texts) and not Replay.count
        ids = torch.cat((texts[0], tokens(1, 3)), dim=1)


def test_decoding_can_be_told_to_stay_as_it_is(pair):
    model, _ = pair()
    for options in ({"disable_compile": True}, {"cache_implementation": "dynamic"}):
        generate(model, tokens(1, 9), 10, cache=HippocampalCache(), **options)
    assert not Replay.count
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens(1, 9), 10, cache=HippocampalCache(), cache_implementation="static")
