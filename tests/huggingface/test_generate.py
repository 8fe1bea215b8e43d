"""``generate`` in all its modes gives what the same model computes without any cache."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.cache_layers import MemoryLayer

from ..models import CAPACITY, SINKS, base, generate, greedy, logits, retrofitted, tokens
from .generating import (
    LENGTHS,
    LONG,
    NEW,
    STATIC,
    calls_of,
    fast,  # noqa: F401 - fixtures
    left_padded,
    some,
)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@some
def test_greedy(name, length):
    model, ids = retrofitted(name), tokens(2, length)
    expected = greedy(model, ids, NEW)
    seen = calls_of(model)
    assert torch.equal(generate(model, ids, NEW), expected)
    assert seen == [length] + [1] * (NEW - 1), "every token is read once"


@some
def test_without_a_cache(name):
    model, ids = retrofitted(name), tokens(2, LONG)
    seen = calls_of(model)
    uncached = generate(model, ids, use_cache=False)
    assert seen == list(range(LONG, LONG + 8))
    assert torch.equal(uncached, generate(model, ids))


@pytest.mark.parametrize("options", [{}, STATIC, {"num_beams": 2}, {"use_cache": False}])
@pytest.mark.parametrize("num_sinks", [0, 1])
def test_the_smallest_window(num_sinks, options):
    model = retrofitted(window_size=1, num_sinks=num_sinks)
    ids = tokens(1, 5)
    if "num_beams" in options:
        assert torch.equal(generate(model, ids, 12, **options), generate(model, ids, 12, use_cache=False, **options))
    else:
        assert torch.equal(generate(model, ids, 12, **options), greedy(model, ids, 12))


def test_scores_and_logits_are_those_of_the_text():
    model, ids = retrofitted(), tokens(2, LONG)
    out = generate(model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected = logits(model, out.sequences[:, :-1])[:, LONG - 1 :]
    for given in (out.scores, out.logits):
        torch.testing.assert_close(torch.stack(given, dim=1).double(), expected, rtol=0, atol=1e-5)  # kept as float32


def test_a_streamer_gets_every_token():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids, streamer = retrofitted(), tokens(1, LONG), Streamer()
    out = generate(model, ids, streamer=streamer)
    assert streamer.got == out[0].tolist() and streamer.ended


@some
def test_embeddings_instead_of_ids(name):
    model, ids = retrofitted(name), tokens(2, LONG)
    embedded = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded, generate(model, ids)[:, LONG:])


def test_a_text_may_outgrow_the_trained_length():
    model = retrofitted(model=base(max_position_embeddings=12))
    ids = tokens(2, LONG)
    assert torch.equal(generate(model, ids, NEW), greedy(model, ids, NEW))
    assert torch.equal(generate(model, ids, NEW, cache_implementation="static"), greedy(model, ids, NEW))


@some
def test_sampling_is_sampling_by_hand(name):
    model, ids = retrofitted(name), tokens(3, LONG)
    torch.manual_seed(7)
    expected = ids
    for _ in range(NEW):
        last = logits(model, expected)[:, -1].float() / 0.7
        drawn = torch.multinomial(last.softmax(dim=-1), num_samples=1)
        expected = torch.cat((expected, drawn), dim=1)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(7)
    assert torch.equal(generate(model, ids, NEW, **options), expected)


@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 4}, {"top_k": 5, "top_p": 0.9}, {"num_beams": 3}], ids=str
)
def test_samples_are_those_without_a_cache(options):
    model, ids = retrofitted(), tokens(2, LONG)
    options = {"do_sample": True, "top_k": 0} | options
    torch.manual_seed(3)
    cached = generate(model, ids, NEW, **options)
    torch.manual_seed(3)
    assert torch.equal(cached, generate(model, ids, NEW, use_cache=False, **options))
    assert len(cached) == 2 * options.get("num_return_sequences", 1)
    assert len(set(map(tuple, cached.tolist()))) == len(cached), "nothing was drawn"


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}], ids=str)
@some
def test_beams_are_those_without_a_cache(name, options):
    model, ids = retrofitted(name), tokens(2, LONG)
    options = {"num_beams": 3} | options
    beams = generate(model, ids, NEW, **options)
    assert torch.equal(beams, generate(model, ids, NEW, use_cache=False, **options))
    assert not torch.equal(beams[:: options.get("num_return_sequences", 1)], generate(model, ids, NEW))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 7}, STATIC], ids=str)
@some
def test_rows_of_unequal_length(name, options):
    model = retrofitted(name)
    ids, mask, rows = left_padded(LONG, 1, SINKS + 1, CAPACITY)
    together = generate(model, ids, NEW, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = generate(model, row, NEW, **options)[0, row.shape[1] :]
        assert torch.equal(together[i, LONG:], alone), f"{row.shape[1]} tokens"


@some
def test_three_turns_on_the_cache_that_was_returned(name):
    model = retrofitted(name)
    ids, cache, seen = tokens(2, 5), None, calls_of(model)
    for turn in range(3):
        options = {} if cache is None else {"cache": cache}
        seen.clear()
        out = generate(model, ids, NEW, return_dict_in_generate=True, **options)
        assert seen[0] == (5 if turn == 0 else 7 + 1), "only what is new is read"
        cache = out.past_key_values
        assert isinstance(cache, HippocampalCache) and cache.get_seq_length() == out.sequences.shape[1] - 1
        assert torch.equal(out.sequences, generate(model, ids, NEW)), f"turn {turn}"
        ids = torch.cat((out.sequences, tokens(2, 7, seed=turn + 1)), dim=1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_turns_of_a_padded_batch(name):
    """Both turns are padded on the left, so that the second brings pads into the middle of the text."""
    model, cache = retrofitted(name), HippocampalCache()
    ids, mask, rows = left_padded(LONG, 1, 4)
    for _ in range(2):
        together = generate(model, ids, NEW, attention_mask=mask, cache=cache)
        alone = [generate(model, row, NEW) for row in rows]
        for i, row in enumerate(rows):
            assert torch.equal(together[i, -NEW:], alone[i][0, row.shape[1] :])
        more, its_mask, new_rows = left_padded(2, 9, 5)
        ids = torch.cat((together, more), dim=1)
        mask = torch.cat((mask, torch.ones(3, NEW, dtype=torch.long), its_mask), dim=1)
        rows = [torch.cat(pair, dim=1) for pair in zip(alone, new_rows, strict=True)]


@pytest.mark.parametrize("make", [HippocampalCache, DynamicCache])
def test_a_cache_of_ones_own(make):
    model, ids, cache = retrofitted(), tokens(2, LONG), make()
    expected = generate(model, ids, NEW)
    assert torch.equal(generate(model, ids, NEW, cache=cache), expected)
    assert cache.get_seq_length() == LONG + NEW - 1
    assert [type(layer) for layer in cache.layers] == [MemoryLayer] * 3
    assert [layer.keys.shape[2] for layer in cache.layers] == [CAPACITY] * 3
    again = torch.cat((expected, tokens(2, 4)), dim=1)
    assert torch.equal(generate(model, again, cache=cache), generate(model, again))


@pytest.mark.parametrize("size", [1, 3, CAPACITY, LONG - 1, 1000])
@some
def test_prompts_read_in_chunks(name, size):
    model, ids = retrofitted(name), tokens(2, LONG)
    expected, seen = generate(model, ids), calls_of(model)
    assert torch.equal(generate(model, ids, prefill_chunk_size=size), expected)
    assert seen[:-7] == [size] * (LONG // size) + [LONG % size] * (LONG % size > 0)


def test_a_second_turn_is_read_in_chunks(monkeypatch):
    model, ids = retrofitted(), tokens(2, LONG)
    ids[0, :3] = 0
    mask = (ids != 0).long()
    for options in ({}, {"prefill_chunk_size": 4}):
        cache, seen = HippocampalCache(), calls_of(model)
        generate(model, ids[:, :6], 1, attention_mask=mask[:, :6], cache=cache)
        monkeypatch.setattr("ahn_layers.huggingface.prefill.PREFILL_CHUNK", 4)
        turn = generate(model, ids, NEW, attention_mask=mask, cache=cache, **options)
        assert seen[1:7] == [4, 4, 4, 4, 3, 1]
        monkeypatch.undo()
        assert torch.equal(turn, generate(model, ids, NEW, attention_mask=mask))
        model.get_decoder()._forward_pre_hooks.clear()


def test_very_long_prompts_are_read_in_chunks_unasked():
    model, ids = retrofitted(model=base(num_hidden_layers=1)), tokens(1, 4096 + 300)
    seen = calls_of(model)
    out = generate(model, ids, 3)
    assert seen == [4096, 300, 1, 1]
    assert torch.equal(out, generate(model, ids, 3, prefill_chunk_size=ids.shape[1]))
