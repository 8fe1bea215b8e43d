"""What is done to a cache is done to all of its layers, or to none."""

import pytest
import torch
from transformers import DynamicCache

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.decoder import CACHE

from ..models import logits, retrofitted, tokens
from ..refusing import refused
from .caching import close

READ, WHOLE = 20, 30
WIDE_NARROW_WIDE = {"window_size": {0: 50, 1: 4, 2: 50}, "num_sinks": {0: 0, 1: 1, 2: 0}}


def filled(model, cache, rows=1):
    ids = tokens(rows, WHOLE)
    logits(model, ids[:, :READ], READ, cache)
    return ids


@pytest.mark.parametrize("name, options", [("llama", WIDE_NARROW_WIDE), ("gemma2", {"window_size": 50})])
def test_tokens_are_taken_back_from_all_layers_or_none(name, options):
    """The layers before the one that refuses have room for all tokens, and could give theirs back."""
    model, cache = retrofitted(name, **options), HippocampalCache()
    ids = filled(model, cache)
    if name == "gemma2":  # its first and its last layer slide: now the last one alone refuses
        cache.layers[0].activate_past_recording()
    with pytest.raises(RuntimeError):
        cache.crop(-3)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {READ}
    close(logits(model, ids[:, READ:], WHOLE, cache).double(), logits(model, ids)[:, READ:].double())


def test_a_cache_of_transformers_of_which_some_layers_refused_is_not_read():
    model, cache = retrofitted(**WIDE_NARROW_WIDE), DynamicCache()
    ids = filled(model, cache)
    with pytest.raises(RuntimeError, match="cannot be undone"):
        cache.crop(-3)
    with refused(RuntimeError, "DynamicCache", "[17, 20]", "Begin a new cache"):
        logits(model, ids[:, READ:], WHOLE, cache)


ROWS = {
    "take": lambda cache: cache.take([1, 0]),
    "join": lambda cache: HippocampalCache.join([cache, cache]),
    "put": lambda cache: cache.put([0, 1], cache),
}


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_rows_of_a_recurrence_are_not_left_behind(change):
    """A recurrence that runs beside attention that is not retrofitted is held by the same layer."""
    model, cache = retrofitted("falcon_h1", layers=[0, 2]), HippocampalCache()
    filled(model, cache, rows=2)
    with refused(
        ValueError, "LinearAttentionAndFullAttentionLayer", "cannot be taken out, put in or joined", "Keep a cache"
    ):
        change(cache)


def test_steps_of_one_token_are_still_compared():
    model, cache = retrofitted(), DynamicCache()
    ids = filled(model, cache)
    cache.layers[1].state.length -= 1
    with pytest.raises(RuntimeError, match="different numbers of tokens"), torch.no_grad():
        model(ids[:, READ : READ + 1], **{CACHE: cache})


@pytest.mark.parametrize("rows", [True, [True, False], torch.tensor([True, False]), torch.tensor([1.0, 0.0])], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_a_mask_is_not_read_as_numbers_of_rows(rows):
    model, cache = retrofitted(), HippocampalCache()
    filled(model, cache, rows=2)
    for change in (lambda: cache.take(rows), lambda: cache.put(rows, cache)):
        with refused(TypeError, "expected whole numbers of rows", "mask.nonzero()"):
            change()


def test_rows_of_a_cache_are_put_into_itself():
    model, cache = retrofitted(), HippocampalCache()
    ids = filled(model, cache, rows=2)
    cache.put(iter([1, 0]), cache)
    close(logits(model, ids.flip(0)[:, READ:], 3, cache), logits(model, ids.flip(0))[:, READ:])
