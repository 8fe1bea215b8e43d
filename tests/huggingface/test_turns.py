"""Chats of a batch over several turns: rows that finish early leave no pads in their cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, retrofitted, tokens

pytestmark = pytest.mark.usefixtures("unchecked")
QUIET = {"do_sample": False, "pad_token_id": 0}
WHOLE = {"return_dict_in_generate": True}


def real_tokens(sequences, prompt, mask, end):
    """The mask of a conversation so far: ones up to each row's end, that included."""
    mask = torch.cat((mask, torch.ones_like(sequences[:, prompt:])), dim=1)
    for row, text in enumerate(sequences):
        ends = (text[prompt:] == end).nonzero()
        if len(ends):
            mask[row, prompt + int(ends[0]) + 1 :] = 0
    return mask


def chat(model, cache, prompts, mask, turns=3, options=QUIET, **first):
    """Each turn's text and mask; a token of the first turn ends rows, so that one of them finishes early."""
    free = model.generate(prompts, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **options)
    end = int(free[0, prompts.shape[1] + 2])
    text = prompts
    for turn in range(turns):
        before = text.shape[1]
        kept = {CACHE: cache} if cache is not None else first
        out = model.generate(text, attention_mask=mask, max_new_tokens=8, eos_token_id=end, **WHOLE, **options, **kept)
        cache, text = out[CACHE], out.sequences
        mask = real_tokens(text, before, mask, end)
        yield text, mask, before, end
        new = tokens(len(text), 3, seed=10 + turn)
        text, mask = torch.cat((text, new), dim=1), torch.cat((mask, torch.ones_like(new)), dim=1)


CACHES = {
    "own": (HippocampalCache, {}),
    "dynamic": (DynamicCache, {}),
    "static": (lambda: StaticCache(retrofitted().config, 128), {}),
    "made by generate": (lambda: None, {}),
    "static, made by generate": (lambda: None, {"cache_implementation": "static"}),
}


@pytest.mark.parametrize(
    "left, window_size, cache", [*((4, 6, cache) for cache in CACHES), *((0, 60, cache) for cache in list(CACHES)[::2])]
)
def test_every_turn_of_every_row_is_that_of_the_row_alone(left, window_size, cache):
    model = retrofitted(window_size=window_size)
    prompts, mask = tokens(3, CAPACITY), torch.ones(3, CAPACITY, dtype=torch.long)
    mask[2, :left] = 0
    make, first = CACHES[cache]
    finished_early = 0
    for text, seen, before, end in chat(model, make(), prompts, mask, **first):
        for row in range(3):
            asked = text[row, :before][seen[row, :before].bool()][None]
            alone = model.generate(
                asked, attention_mask=torch.ones_like(asked), max_new_tokens=8, eos_token_id=end, **QUIET
            )[0, asked.shape[1] :]
            assert torch.equal(text[row, before : before + len(alone)], alone)
            finished_early += not seen[row, -1]
    assert finished_early


@pytest.mark.parametrize("window_size", [6, 100])
@pytest.mark.parametrize("kept", [{}, WHOLE, {CACHE: HippocampalCache}], ids=["no cache", "returned", "kept"])
def test_rows_that_stop_without_an_end_token_go_on_with_the_others(kept, window_size):
    """As in the base model, which pads nothing then: what they have said stays visible to them."""
    model, ids = retrofitted(window_size=window_size), tokens(3, 8)
    stops = StoppingCriteriaList([StopAt(9)])
    options = {"max_new_tokens": 14, "stopping_criteria": stops, **QUIET}
    kept = {name: make() if name == CACHE else make for name, make in kept.items()}
    out = model.generate(ids, **options, **kept)
    out = out.sequences if kept == WHOLE else out
    ended = (out[:, 8:-1] % 9 == 0).any(dim=1)
    assert ended.any() and not ended.all()
    assert torch.equal(out, model.generate(ids, max_new_tokens=14, use_cache=False, **QUIET))
    more = torch.cat((out, tokens(3, 2, seed=1)), dim=1)
    if CACHE in kept:
        assert torch.equal(
            model.generate(more, max_new_tokens=3, **QUIET, **kept), model.generate(more, max_new_tokens=3, **QUIET)
        )


class StopAt(StoppingCriteria):
    """Stops at multiples of a number."""

    def __init__(self, number):
        self.number = number

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % self.number == 0


def test_rows_of_several_samples_keep_no_pads():
    model, cache = retrofitted(), HippocampalCache()
    torch.manual_seed(0)
    out = model.generate(
        tokens(1, 5), max_new_tokens=12, do_sample=True, num_return_sequences=4, eos_token_id=list(range(1, 20)),
        pad_token_id=0, **{CACHE: cache},
    )  # fmt: skip
    seen = cache.layers[0].state.seen
    lengths = (out != 0).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    assert torch.equal(seen, torch.where(lengths < out.shape[1], lengths, out.shape[1] - 1))


@pytest.mark.parametrize("static", [False, True])
def test_beams_answer_as_without_a_cache(static):
    model = retrofitted()
    options = {"num_beams": 3, "max_new_tokens": 10, "eos_token_id": [3, 7, 11, 30, 31]} | WHOLE
    kept = {"cache_implementation": "static"} if static else {CACHE: HippocampalCache()}
    out = model.generate(tokens(2, 9), **options, **QUIET, **kept).sequences
    assert torch.equal(out, model.generate(tokens(2, 9), use_cache=False, **options, **QUIET).sequences)


def test_a_prompt_that_is_all_in_the_cache():
    model, ids, cache = retrofitted(), tokens(1, 30), HippocampalCache()
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    for shorter in (0, 4):
        with pytest.raises(ValueError, match="there is nothing new to read"):
            model.generate(ids[:, : 30 - shorter], max_new_tokens=2, **QUIET, **{CACHE: cache})
    assert cache.get_seq_length() == 30
    out = model.generate(torch.cat((ids, ids[:, :1]), 1), max_new_tokens=3, **QUIET, **{CACHE: cache})
    assert torch.equal(out, model.generate(torch.cat((ids, ids[:, :1]), 1), max_new_tokens=3, **QUIET))


def test_no_turn_follows_a_beam_search():
    """Its cache holds the beams that were left, and not the sequences that were returned."""
    model, cache, ids = retrofitted(), HippocampalCache(), tokens(1, 20)
    before = cache.clone()
    found = model.generate(ids, num_beams=2, num_return_sequences=2, max_new_tokens=6, do_sample=False, cache=cache)
    more = torch.cat((found, tokens(2, 3, seed=1)), dim=1)
    for held in (cache, cache.clone()):
        with pytest.raises(ValueError, match="used by a beam search"):
            model.generate(more, max_new_tokens=2, cache=held)
    expected = model.generate(more, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(more, max_new_tokens=4, do_sample=False, cache=before), expected)
    cache.reset()
    assert torch.equal(model.generate(more, max_new_tokens=4, do_sample=False, cache=cache), expected)
