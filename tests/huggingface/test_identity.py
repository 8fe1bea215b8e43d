"""A cache knows the memory weights that filled it, in the process and in files."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ahn_layers import (
    AveragePooling,
    HippocampalCache,
    SalientSlots,
    adapter_parameters,
    load_adapter,
    save_adapter,
    window_only,
)
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, base, retrofitted, tokens, train_memory

pytestmark = pytest.mark.usefixtures("unchecked")


def call(model, ids, cache):
    with torch.no_grad():
        return model(ids, **{CACHE: cache}).logits


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("length", [4, 3 * CAPACITY])
@pytest.mark.parametrize("make", [HippocampalCache, DynamicCache, lambda: StaticCache(base().config, 64)])
def test_another_adapter_does_not_continue_a_cache(make, length, count, tmp_path):
    model, cache = retrofitted(), make()
    save_adapter(model, tmp_path / "one")
    call(model, tokens(1, length), cache)
    train_memory(model, seed=1)
    with pytest.raises(ValueError, match="filled with other memory weights"):
        call(model, tokens(1, count), cache)
    with pytest.raises(ValueError, match="filled with other memory weights"):
        model.generate(tokens(1, length + 2), max_new_tokens=1, **{CACHE: cache})
    load_adapter(model, tmp_path / "one")
    assert call(model, tokens(1, count), cache).isfinite().all()


def test_files_and_copies_know_it_too(tmp_path):
    model, cache = retrofitted(), HippocampalCache()
    call(model, tokens(1, 20), cache)
    cache.save(tmp_path / "cache")
    for kept in (HippocampalCache.load(tmp_path / "cache"), cache.clone(), cache.reorder(torch.tensor([0, 0]))):
        assert call(model, tokens(len(kept.layers[0].state.seen), 1), kept).isfinite().all()
    kept = HippocampalCache.load(tmp_path / "cache")
    train_memory(model, seed=1)
    with pytest.raises(ValueError, match="filled with other memory weights"):
        call(model, tokens(1, 1), kept)
    same = retrofitted()
    assert torch.equal(call(same, tokens(1, 1), kept), call(same, tokens(1, 1), cache))


def test_one_changed_value_is_seen_and_a_reset_forgets():
    model, cache = retrofitted(), HippocampalCache()
    call(model, tokens(1, 20), cache)
    parameter = next(p for _, p in adapter_parameters(model))
    with torch.no_grad():
        parameter.view(-1)[-1] += 1e-6
    with pytest.raises(ValueError, match="filled with other memory weights"):
        call(model, tokens(1, 1), cache)
    cache.reset()
    assert call(model, tokens(1, 5), cache).isfinite().all()


def test_the_window_alone_needs_no_memory_weights():
    model, cache = retrofitted(), HippocampalCache()
    with window_only(model):
        call(model, tokens(1, 20), cache)
        train_memory(model, seed=1)
        assert call(model, tokens(1, 1), cache).isfinite().all()


def test_training_steps_do_not_look_at_the_weights(monkeypatch):
    """They change in every step, and there is no cache that could be continued."""
    model = retrofitted()
    monkeypatch.setattr("ahn_layers.huggingface.call.identity_of", lambda *_: pytest.fail("looked at the weights"))
    for use_cache in (None, False):
        model(tokens(1, 20), use_cache=use_cache).logits.sum().backward()
    with torch.no_grad():
        model(tokens(1, 20), use_cache=False)


POOLED = {"compressor": AveragePooling, "num_slots": 2}
BY_VALUES = {"compressor": None, "eviction": SalientSlots(4, score="value_norm", rate=0.1)}


@pytest.mark.parametrize(
    "one, other",
    [
        (POOLED | {"rate": 3}, POOLED | {"rate": 9}),
        (BY_VALUES, BY_VALUES | {"eviction": SalientSlots(4, score="key_norm", rate=0.1)}),
        (BY_VALUES, BY_VALUES | {"eviction": SalientSlots(4, score="value_norm", rate=0.2)}),
    ],
    ids=["rate of a compressor", "score", "rate of an eviction"],
)
def test_options_count_that_no_weight_shows(one, other):
    cache = HippocampalCache()
    call(retrofitted(**one), tokens(1, 3 * CAPACITY), cache)
    assert call(retrofitted(**one), tokens(1, 1), cache).isfinite().all()
    with pytest.raises(ValueError, match="filled with other memory weights"):
        call(retrofitted(**other), tokens(1, 1), cache)
