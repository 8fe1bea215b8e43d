"""``cache=`` works on every transformers: what a version that calls it ``past_key_values`` is given."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GenerationMixin

from ahn_layers import HippocampalCache, restore
from ahn_layers.huggingface import cache_name
from ahn_layers.huggingface.compiled import recorder
from ahn_layers.huggingface.decoder import CACHE

from ..models import retrofitted, tokens


@pytest.fixture
def older(monkeypatch):
    """As if the installed transformers were older than 5.24."""
    monkeypatch.setattr(cache_name, "CACHE", "past_key_values")


class Older(nn.Module):
    """What a model of such a version does with its arguments."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        return past_key_values, kwargs

    def _prepare_generation_config(self, generation_config, **kwargs):
        return generation_config, kwargs


@pytest.mark.parametrize("through", [lambda u: u, copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
def test_an_older_model_gets_the_name_it_knows(older, through):
    model = Older()
    before = set(vars(model))
    cache_name.accept_cache(model)
    model = through(model)
    assert model(1, cache="c", use_cache=True) == ("c", {"use_cache": True})
    assert model(1, past_key_values="c") == ("c", {})
    assert model(1, cache="c", past_key_values=None) == ("c", {})
    assert model._prepare_generation_config(None, cache="c", top_k=1) == (None, {"past_key_values": "c", "top_k": 1})
    with pytest.raises(TypeError, match="cache and past_key_values were both passed"):
        model(1, cache="c", past_key_values="d")
    cache_name.refuse_cache(model)
    assert set(vars(model)) == before and model(1, cache="c") == (None, {"cache": "c"})


def test_nothing_is_done_where_the_name_is_known():
    if CACHE != cache_name.NAME:
        pytest.skip("transformers before 5.24")
    model = retrofitted()
    assert not hasattr(model, "_takes_cache") and "_prepare_generation_config" not in vars(model)


def test_a_retrofitted_model_takes_cache():
    """On whatever is installed, by call and by ``generate``."""
    model, ids, cache = retrofitted(), tokens(1, 30), HippocampalCache()
    with torch.no_grad():
        model(ids[:, :20], cache=cache, use_cache=True)
    assert cache.get_seq_length() == 20
    written = model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(written, model.generate(ids, max_new_tokens=3, do_sample=False))
    assert cache.get_seq_length() == 32
    restore(model)
    assert "_takes_cache" not in vars(model)
    assert model._prepare_generation_config.__func__ is GenerationMixin._prepare_generation_config


def test_an_older_step_is_recorded_too(older, monkeypatch):
    """The step that a server takes from ``get_compiled_call``."""
    monkeypatch.setattr(recorder, "CACHE", "past_key_values")
    monkeypatch.setattr(recorder, "can_record", lambda cache: cache is not None)
    monkeypatch.setattr(recorder, "Step", lambda model, region: lambda **inputs: inputs)
    cache = HippocampalCache()
    step = recorder.Recorder(nn.Module()).step(lambda: pytest.fail)
    assert step(input_ids=1, cache=cache) == {"input_ids": 1, "past_key_values": cache}
