"""When ``generate`` makes a static cache unasked: on a GPU, here with a model that is told that it stands on one."""

import pytest
import torch

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.static_layer import StaticMemoryLayer

from ..models import generate, retrofitted, tokens

ENOUGH, FEW = 32, 31
"""New tokens."""


def is_static(model, count=ENOUGH, **options):
    """Whether layers of the cache have fixed addresses, asked in the middle of ``generate``."""
    seen = []

    def look(module, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # before transformers 5.24
        seen.append(any(isinstance(u, StaticMemoryLayer) for u in cache.layers))

    with model.register_forward_pre_hook(look, with_kwargs=True):
        found = generate(model, tokens(1, 20), count, **options)
    assert len(set(seen)) == 1
    return seen[0], found


@pytest.fixture
def on_a_gpu(monkeypatch):
    model = retrofitted()
    monkeypatch.setattr(model.get_compiled_call, "serves", lambda compile_config: compile_config is None, raising=True)
    return model


def test_it_is_where_nothing_is_lost_by_it(on_a_gpu):
    plain, expected = is_static(retrofitted())
    assert not plain
    for options in ({}, {"do_sample": True, "top_k": 1}):
        static, found = is_static(on_a_gpu, **options)
        assert static and torch.equal(found, expected)
    assert on_a_gpu.generation_config.cache_implementation is None


@pytest.mark.parametrize(
    "options",
    [
        {"count": FEW},
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"return_dict_in_generate": True},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": True, "cache": "theirs"},
    ],
    ids=str,
)
def test_it_is_not_where_the_caller_needs_another(on_a_gpu, options):
    options = options | ({"cache": HippocampalCache()} if "cache" in options else {})
    assert not is_static(on_a_gpu, **options)[0]


def test_it_is_not_where_some_layers_have_no_memory(monkeypatch):
    model = retrofitted(layers=[0, 2])
    monkeypatch.setattr(model.get_compiled_call, "serves", lambda compile_config: True)
    assert not is_static(model)[0]
