"""Sliding layers that were left alone, in caches that record their past: copies, rows and tokens taken back."""

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ahn_layers import HippocampalCache, full_attention

from ..models import FAMILIES, base, logits, retrofitted, tokens
from ..refusing import refused
from .caching import close

READ, WHOLE = 21, 30


def returns_what_is_seen():
    """Whether a sliding layer that records returns, in its second call, no more than its mask has columns for."""
    layer = DynamicSlidingWindowLayer(4)
    layer.activate_past_recording()
    keys = torch.zeros(1, 1, 4, 2)
    layer.update(keys, keys)
    return layer.update(keys, keys)[0].shape[2] == 7


several_calls = pytest.mark.skipif(
    not returns_what_is_seen(), reason="this transformers records one call at a time in sliding layers, as 5.17"
)


def recorded(model, rows=2, before=True):
    """A cache that has recorded more than its sliding layers see, and the texts."""
    ids, cache = tokens(rows, WHOLE), HippocampalCache()
    if before:
        cache.activate_past_recording()
    logits(model, ids[:, :READ], 7, cache)
    if not before:
        cache.activate_past_recording()
    return ids, cache


def saved(cache, folder):
    cache.save(folder / "cache")
    return HippocampalCache.load(folder / "cache")


COPIES = {
    "clone": lambda cache, _: cache.clone(),
    "save": saved,
    "take": lambda cache, _: cache.take([0, 1]),
    "join": lambda cache, _: HippocampalCache.join([cache.take(0), cache.take(1)]),
}


@several_calls
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_record_nothing_and_hold_no_more_than_is_seen(copy, tmp_path):
    model = retrofitted("gemma3")
    ids, cache = recorded(model)
    copied = copy(cache, tmp_path)
    for size in (1, 3):
        close(logits(model, ids[:, READ:], size, copied.clone()), logits(model, ids)[:, READ:])
    cache.crop(-3)  # the original still can
    close(logits(model, ids[:, READ - 3 :], 3, cache), logits(model, ids)[:, READ - 3 :])


@several_calls
def test_a_row_that_is_put_in_has_no_past():
    model = retrofitted("gemma3", window_size=50)
    ids, cache = recorded(model)
    other = recorded(model, 1, before=False)[1]
    cache.put(1, other)
    with refused(RuntimeError, "layer 0, which is not retrofitted", "of the 8 tokens", "activate_past_recording"):
        cache.crop(-3)
    texts = torch.cat((ids[:1], tokens(1, WHOLE)))
    close(logits(model, texts[:, READ:], 3, cache), logits(model, texts)[:, READ:])


@several_calls
def test_what_was_not_recorded_is_not_taken_back():
    """The memory's window is large enough; the sliding layers kept what they see, which is not enough further back."""
    model = retrofitted("gemma3", window_size=50)
    ids, cache = recorded(model, before=False)
    with refused(RuntimeError, "layer 0", "3 of the 8 tokens", "activate_past_recording"):
        cache.crop(-5)
    close(logits(model, ids[:, READ:], 1, cache), logits(model, ids)[:, READ:])


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_an_empty_cache_serves_full_attention_too(name):
    """Layers with a recurrence have to be there before the first call, as the base model's own cache has them."""
    model, ids = retrofitted(name), tokens(2, WHOLE)
    with full_attention(model):
        out = logits(model, ids, 7, HippocampalCache())
    assert torch.allclose(out, logits(base(name), ids), rtol=0, atol=FAMILIES[name].tolerance)
