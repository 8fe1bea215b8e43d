"""When the cache of ``generate`` gets fixed addresses unasked: on a GPU, here with a model that is told so."""

import pytest
import torch
from transformers import DynamicCache

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.static_layer import StaticMemoryLayer

from ..models import generate, retrofitted, tokens

ENOUGH, FEW = 32, 31
"""New tokens."""


def is_static(model, count=ENOUGH, **options):
    """Whether layers of the cache have fixed addresses while ``generate`` decodes."""
    seen = []

    def look(module, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # before transformers 5.24
        seen.append(any(isinstance(u, StaticMemoryLayer) for u in cache.layers))

    with model.register_forward_pre_hook(look, with_kwargs=True):
        found = generate(model, tokens(1, 20), count, **options)
    assert len(set(seen[1:])) == 1
    return seen[-1], found


@pytest.fixture
def on_a_gpu(monkeypatch):
    model = retrofitted()
    monkeypatch.setattr(model.get_compiled_call, "serves", lambda compile_config: compile_config is None, raising=True)
    return model


def test_it_is_where_nothing_is_lost_by_it(on_a_gpu):
    plain, expected = is_static(retrofitted())
    assert not plain
    for options in (
        {},
        {"do_sample": True, "top_k": 1},
        {"cache": HippocampalCache()},
        {"return_dict_in_generate": True},
    ):
        static, found = is_static(on_a_gpu, **options)
        assert static and torch.equal(getattr(found, "sequences", found), expected)
    assert on_a_gpu.generation_config.cache_implementation is None


@pytest.mark.parametrize(
    "options",
    [
        {"count": FEW},
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [False, True])
def test_it_is_not_where_the_caller_needs_another(on_a_gpu, options, kept):
    options = options | ({"cache": HippocampalCache()} if kept else {})
    assert not is_static(on_a_gpu, **options)[0]


@pytest.mark.parametrize("make", [DynamicCache, HippocampalCache], ids=["of transformers", "that records"])
def test_it_is_not_where_the_cache_takes_tokens_back(on_a_gpu, make):
    cache = make()
    if make is HippocampalCache:
        cache.activate_past_recording()
    assert not is_static(on_a_gpu, cache=cache)[0]


def test_it_is_not_where_some_layers_have_no_memory(monkeypatch):
    model = retrofitted(layers=[0, 2])
    monkeypatch.setattr(model.get_compiled_call, "serves", lambda compile_config: True)
    assert not is_static(model)[0]
