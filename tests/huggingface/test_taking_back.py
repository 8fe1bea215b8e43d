"""Tokens that were taken back are never read; what was folded cannot be taken back."""

# ruff: noqa: F811 - fixtures are imported

import pytest
import torch

from ahn_layers import HippocampalCache, window_only
from ahn_layers.huggingface.recording import MAX_ROLLBACK

from ..methods import KINDS
from ..models import CAPACITY, generate, logits, positions, retrofitted, tokens
from .caching import LONG, close, every_length, fast, go_on, model, read, same, tensors  # noqa: F401 - fixtures


def rolled_back(model, ids, count, cache, **options):
    """A cache that recorded its past, read ``count`` more tokens in pieces, and took them back."""
    cache.activate_past_recording()
    read(model, ids, cache, **options)
    cache.crop(0)  # what was read so far will stay
    draft = tokens(len(ids), count, seed=3)
    logits(model, draft, max(1, count // 4), cache)
    cache.crop(-count)
    return cache


@pytest.mark.parametrize("count", [1, 4, LONG])
@every_length
def test_taken_back_is_never_read(model, length, count):
    ids = tokens(2, length)
    cache = rolled_back(model, ids, count, HippocampalCache())
    assert cache.get_seq_length() == length
    fresh = read(model, ids)
    for name, u in tensors(fresh).items():
        close(tensors(cache)[name].double(), u.double())
    close(go_on(model, cache), go_on(model, fresh))


@every_length
def test_everything_is_taken_back(model, length):
    """A cache that has recorded from the start is empty again."""
    cache, mask = HippocampalCache(), torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    cache.activate_past_recording()
    read(model, tokens(2, length), cache, attention_mask=mask, position_ids=positions(mask))
    cache.crop(-length)
    assert cache.get_seq_length() == 0
    close(go_on(model, cache, rows=2), go_on(model, HippocampalCache(), rows=2))


@pytest.mark.parametrize("compressor", [*KINDS, None])
def test_a_part_of_a_draft_is_taken_back(compressor):
    model, cache, text = retrofitted(compressor=compressor), HippocampalCache(), tokens(1, LONG + 20)
    cache.activate_past_recording()
    read(model, text[:, :LONG], cache)
    for start, kept in ((LONG, 3), (LONG + 3, 0), (LONG + 3, 7), (LONG + 10, 10)):
        draft = torch.cat((text[:, start : start + kept], tokens(1, 10 - kept, seed=start)), dim=1)
        expected = logits(model, torch.cat((text[:, :start], draft), dim=1))[:, start:]
        close(logits(model, draft, 10, cache), expected)
        cache.crop(kept - 10)
        assert cache.get_seq_length() == start + kept
    close(go_on(model, cache, rows=1), go_on(model, read(model, text), rows=1))


def test_rows_of_unequal_length_are_taken_back(model):
    ids, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :-3] = 0
    options = {"attention_mask": mask, "position_ids": positions(mask)}
    cache = rolled_back(model, ids, 5, HippocampalCache(), **options)
    close(go_on(model, cache), go_on(model, read(model, ids, **options)))


def test_without_the_memory_too(model):
    ids = tokens(2, LONG)
    with window_only(model):
        cache = rolled_back(model, ids, 5, HippocampalCache())
        close(go_on(model, cache), go_on(model, read(model, ids)))


@pytest.mark.parametrize("name", ["gemma3", "mistral_window", "lfm2"])
def test_layers_of_other_kinds_are_taken_back_alike(name):
    model, ids = retrofitted(name), tokens(1, LONG)

    def fresh():
        cache = generate(model, ids[:, :1], 1, return_dict_in_generate=True).past_key_values
        cache.activate_past_recording()
        logits(model, ids[:, 1:], LONG - 1, cache)
        return cache

    cache, new = fresh(), tokens(1, CAPACITY + 3, seed=77)
    cache.crop(0)
    logits(model, tokens(1, 4, seed=3), 4, cache)
    cache.crop(-4)
    close(logits(model, new, CAPACITY + 3, cache), logits(model, torch.cat((ids, new), dim=1))[:, LONG:])


def test_inside_the_window_nothing_need_be_recorded(model):
    ids, cache = tokens(2, 3), HippocampalCache()
    read(model, torch.cat((ids, tokens(2, CAPACITY - 3, seed=2)), dim=1), cache)
    cache.crop(3 - CAPACITY)
    assert cache.get_seq_length() == 3 and torch.equal(go_on(model, cache), go_on(model, read(model, ids)))
    layer = read(model, ids).layers[0]
    layer.crop(2)
    assert layer.get_seq_length() == 2, "a positive number is the length to keep"


def test_folded_tokens_cannot_be_taken_back(model):
    cache = read(model, tokens(2, CAPACITY + 1))
    before = tensors(cache)
    with pytest.raises(RuntimeError, match=r"0 tokens are recorded.*activate_past_recording"):
        cache.crop(-1)
    assert same(cache, before)
    cache.crop(0)
    assert same(cache, before)
    cache.activate_past_recording()
    logits(model, tokens(2, 4), 4, cache)
    before = tensors(cache)
    with pytest.raises(RuntimeError, match="4 tokens are recorded"):
        cache.crop(-5)
    assert same(cache, before)
    cache.crop(-4)


def test_what_is_recorded_is_bounded(model):
    ids, cache = tokens(1, 3 * MAX_ROLLBACK), HippocampalCache()
    cache.activate_past_recording()
    expected = logits(model, ids, ids.shape[1], cache)
    close(expected, logits(model, ids))
    assert len(cache.layers[0].recording) <= 2 * MAX_ROLLBACK
    for token in tokens(1, MAX_ROLLBACK + 10, seed=1).split(1, dim=1):
        logits(model, token, 1, cache)
    assert len(cache.layers[0].recording) == MAX_ROLLBACK
    cache.crop(-MAX_ROLLBACK)
    text = torch.cat((ids, tokens(1, MAX_ROLLBACK + 10, seed=1)[:, :10]), dim=1)
    close(go_on(model, cache, rows=1), go_on(model, read(model, text), rows=1))
