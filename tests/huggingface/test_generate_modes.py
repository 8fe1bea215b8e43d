"""Generation with static caches, with assistants, in the modes of a model, and in threads."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from ahn_layers import HippocampalCache, full_attention, window_only
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, WINDOW, base, generate, greedy, retrofitted, tokens
from ..refusing import refused
from .generating import (
    LONG,
    NEW,
    STATIC,
    calls_of,
    fast,  # noqa: F401 - fixtures
    some,
)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
@some
def test_static_is_dynamic(name, options):
    model = retrofitted(name)
    for length in (3, LONG):
        ids = tokens(2, length)
        for _ in range(2):  # nothing of the first call is left in the second
            static = generate(model, ids, NEW, cache_implementation="static", **options)
            assert torch.equal(static, generate(model, ids, NEW, **options))


def test_a_static_cache_goes_on():
    model, ids = retrofitted(), tokens(2, LONG)
    first = generate(model, ids, NEW, cache_implementation="static", return_dict_in_generate=True)
    more = torch.cat((first.sequences, tokens(2, 4)), dim=1)
    assert torch.equal(generate(model, more, 1, cache=first.past_key_values), generate(model, more, 1))


@pytest.fixture
def crops(monkeypatch):
    """How many tokens each call of ``crop`` takes back."""
    seen, crop = [], MemoryLayer.crop

    def spy(self, count):
        before = self.get_seq_length()
        crop(self, count)
        seen.append(before - self.get_seq_length())

    monkeypatch.setattr(MemoryLayer, "crop", spy)
    return seen


@some
def test_prompt_lookup_is_greedy(name, crops):
    model, ids = retrofitted(name), tokens(1, 7).repeat(1, 3)
    assert torch.equal(generate(model, ids, 3 * NEW, prompt_lookup_num_tokens=4), greedy(model, ids, 3 * NEW))
    assert max(crops) > 0, "no draft was refused in this test"


ASSISTANTS = {
    "the base model": lambda: base(),
    "a retrofitted model": lambda: retrofitted(),
    "a shallow one": lambda: retrofitted(model=base(num_hidden_layers=1)),
}


@pytest.mark.parametrize("assistant", ASSISTANTS.values(), ids=ASSISTANTS)
@pytest.mark.parametrize("length", [2, CAPACITY, LONG])
def test_assisted_is_greedy(length, assistant, crops):
    model, ids = retrofitted(), tokens(1, length)
    assistant = assistant()
    assistant.generation_config.assistant_confidence_threshold = 0
    seen = calls_of(model)
    assert torch.equal(generate(model, ids, 3 * NEW, assistant_model=assistant), greedy(model, ids, 3 * NEW))
    assert max(seen) > 2, "nothing was drafted in this test"


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": base()}], ids=list)
def test_an_assisted_turn_needs_an_empty_cache(options):
    """Its first step reads the whole text, also what the cache holds; of transformers too, without an error."""
    model, cache = retrofitted(), HippocampalCache()
    text = generate(model, tokens(1, LONG), 7, **options, **{CACHE: cache})
    text = torch.cat((text, tokens(1, 3, seed=8)), dim=1)
    with refused(ValueError, "assisted decoding", f"a cache that holds {LONG + 6} tokens", "an empty cache"):
        generate(model, text, 20, **options, **{CACHE: cache})
    assert torch.equal(generate(model, text, 20, **{CACHE: cache}), greedy(model, text, 20))


def test_a_cache_that_is_not_to_be_used_is_refused():
    """Of transformers it takes in the whole text at each step."""
    model, cache = retrofitted(), HippocampalCache()
    with refused(ValueError, "use_cache=False and a cache", "Pass one of them"):
        generate(model, tokens(1, LONG), use_cache=False, **{CACHE: cache})
    assert cache.get_seq_length() == 0


def test_a_retrofitted_model_assists_the_base_model(crops):
    model, ids = base(), tokens(1, LONG)
    expected = generate(model, ids, 3 * NEW)
    assert torch.equal(generate(model, ids, 3 * NEW, assistant_model=retrofitted()), expected)
    assert max(crops) > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, STATIC], ids=str)
@some
def test_full_attention_is_the_base_model(name, options):
    model, ids = retrofitted(name), tokens(2, LONG)
    before = generate(model, ids, NEW, **options)
    with full_attention(model):
        full = generate(model, ids, NEW, **options)
    assert torch.equal(full, generate(base(name), ids, NEW, **options))
    assert torch.equal(generate(model, ids, NEW, **options), before)
    assert not torch.equal(full, before)


@some
def test_window_only(name):
    model, ids = retrofitted(name), tokens(2, LONG)
    plain = retrofitted(name, compressor=None)
    with window_only(model):
        out = generate(model, ids, NEW)
        assert torch.equal(out, greedy(model, ids, NEW))
        assert torch.equal(out, generate(model, ids, NEW, cache_implementation="static"))
    assert torch.equal(out, generate(plain, ids, NEW))
    assert not torch.equal(out, generate(model, ids, NEW))


def in_threads(*functions):
    """What each function returns, called in a thread of its own, all at once."""
    start = Barrier(len(functions))

    def run(function):
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def test_generations_on_one_model_do_not_meet():
    model, texts = retrofitted(), [tokens(1, length, seed=length) for length in (3, CAPACITY, LONG, 30)]
    expected = [generate(model, ids, 20) for ids in texts]
    got = in_threads(*(lambda ids=ids: generate(model, ids, 20) for ids in texts))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_models_in_different_modes_do_not_meet():
    """The switches hold for a model: its copies are free of them."""
    ids, models = tokens(1, LONG), [retrofitted()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]

    def full():
        with full_attention(models[1]):
            return generate(models[1], ids, 20)

    def window():
        with window_only(models[2]):
            return generate(models[2], ids, 20)

    functions = (lambda: generate(models[0], ids, 20), full, window)
    expected = [function() for function in functions]
    assert len({tuple(one[0].tolist()) for one in expected}) == 3
    got = in_threads(*functions)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert torch.equal(expected[1], generate(base(), ids, 20))


def test_a_batch_that_changes_between_calls():
    """A new text on a used model: nothing of the last one is kept."""
    model = retrofitted(window_size=WINDOW)
    first = generate(model, tokens(3, LONG))
    generate(model, tokens(1, 4, seed=9), 3, num_beams=2)
    assert torch.equal(generate(model, tokens(3, LONG)), first)
