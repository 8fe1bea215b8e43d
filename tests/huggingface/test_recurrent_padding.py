"""Padding is nothing to convolutions and recurrences either, or it is refused."""

import pytest
import torch

from ahn_layers import HippocampalCache

from ..hard.batches import read_in_groups
from ..models import CACHE, FAMILIES, logits, positions, retrofitted, tokens
from .recurrent import go_on, held, read

BESIDE = ["falcon_h1", "lfm2"]  # the memory; in place of it
pytestmark = pytest.mark.usefixtures("unchecked")
beside = pytest.mark.parametrize("name", BESIDE)


def padded(rows, length):
    """Texts, padded on the left, and their mask."""
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for row, text in enumerate(rows):
        ids[row, length - text.shape[1] :], mask[row, length - text.shape[1] :] = text[0], 1
    return ids, mask


@beside
def test_rows_that_finish_early_hold_no_pads(name):
    """And a row that is taken out goes on as the row alone."""
    model, prompt = retrofitted(name), tokens(3, 10, seed=4)
    how = {"max_new_tokens": 12, "do_sample": False}
    free = model.generate(prompt, cache=HippocampalCache(), **how)[:, 10:]
    end = next(int(u) for u in free[0, :8] if not bool((free[1] == u).any()) and not bool((free[2, :9] == u).any()))
    cache = HippocampalCache()
    out = model.generate(prompt, cache=cache, eos_token_id=end, pad_token_id=0, **how)
    seen = next(layer.state.seen.tolist() for layer in cache.layers if hasattr(layer, "state"))
    assert seen[0] < seen[1] == 21
    for row in range(3):
        expected = HippocampalCache()
        logits(model, out[row : row + 1, : seen[row]], seen[row], expected)
        taken, new = cache.take(row), tokens(1, 3, seed=9)
        own = torch.arange(seen[row], seen[row] + 3)[None]
        found = logits(model, new, 3, taken, position_ids=own)
        torch.testing.assert_close(found, logits(model, new, 3, expected), rtol=0, atol=FAMILIES[name].tolerance)


@pytest.mark.parametrize("cuts", [30, 7, 1])
@beside
def test_prompts_of_unequal_lengths(name, cuts):
    """Pieces that are all padding in a row, tokens one by one among them, leave the row empty."""
    model, texts = retrofitted(name), [tokens(1, n, seed=n) for n in (30, 9, 2)]
    ids, mask = padded(texts, 30)
    cache, outs = HippocampalCache(), []
    for end in range(cuts, 30 + cuts, cuts):
        part, own = mask[:, : min(end, 30)], positions(mask)[:, end - cuts : end]
        outs.append(logits(model, ids[:, end - cuts : end], cuts, cache, attention_mask=part, position_ids=own))
    for row, text in enumerate(texts):
        alone = HippocampalCache()
        expected = logits(model, text, text.shape[1], alone)[0]
        found = torch.cat(outs, dim=1)[row, -text.shape[1] :]
        torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[name].tolerance)
        own = {"position_ids": torch.tensor([[text.shape[1]]])}
        found, expected = (logits(model, tokens(1, 1), 1, u, **own) for u in (cache.take(row), alone))
        torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[name].tolerance)


@beside
def test_a_row_that_rests_stays_as_it_is(name):
    """Several tokens, all of them padding in one row that goes on."""
    model = retrofitted(name)
    joined = HippocampalCache.join([read(model, 5), read(model, 20, seed=1)])
    before, mask = held(joined.take(0)), torch.ones(2, 23, dtype=torch.long)
    before = {place: value for place, value in before.items() if "states" in place[1]}
    mask[0, :15], mask[0, 20:] = 0, 0
    own = torch.tensor([[5, 5, 5], [20, 21, 22]])
    found = logits(model, tokens(2, 3), 3, joined, attention_mask=mask, position_ids=own)
    expected = logits(model, tokens(2, 3)[1:], 3, read(model, 20, seed=1))
    torch.testing.assert_close(found[1:], expected, rtol=0, atol=FAMILIES[name].tolerance)
    after = held(joined.take(0))
    assert before and all(after[place] == value for place, value in before.items())
    found = logits(model, tokens(1, 2), 1, joined.take(0), position_ids=torch.tensor([[5]]))
    expected = logits(model, tokens(1, 2), 1, read(model, 5), position_ids=torch.tensor([[5]]))
    torch.testing.assert_close(found, expected, rtol=0, atol=FAMILIES[name].tolerance)


@beside
def test_what_cannot_be_right_is_refused(name):
    model = retrofitted(name)
    joined = HippocampalCache.join([read(model, 5), read(model, 20, seed=1)])
    before, mask = held(joined), torch.ones(2, 23, dtype=torch.long)
    mask[0, :15], mask[0, 20] = 0, 0
    with pytest.raises(ValueError, match=r"some of the 3 new tokens of rows \[0\] as padding.*cache.take"):
        logits(model, tokens(2, 3), 3, joined, attention_mask=mask)
    mask[0, 20], mask[1, 17] = 1, 0
    with pytest.raises(ValueError, match=r"hides tokens of rows \[1\].*convolutions or recurrences.*clone"):
        logits(model, tokens(2, 3), 3, joined, attention_mask=mask)
    assert held(joined) == before
    recording, mask = read(retrofitted("lfm2"), 5, recording=True), torch.tensor([[1] * 5 + [0] * 2])
    with pytest.raises(ValueError, match=r"rows \[0\] as padding, and the cache records its past"):
        logits(retrofitted("lfm2"), tokens(1, 2), 2, recording, attention_mask=mask)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("pads", [0, 7])
@beside
def test_a_batch_is_read_in_groups(name, pads, static):
    """As on a GPU: a few rows at a time."""
    model, ids, seen = retrofitted(name), tokens(5, 30), []
    ids[3, :pads] = 0
    mask, caches = (ids != 0).long(), [None if static else HippocampalCache() for _ in range(2)]
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    how |= {"cache_implementation": "static", "disable_compile": True} if static else {}
    expected = model.generate(ids, **how, **({} if static else {CACHE: caches[0]}))
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with read_in_groups(16):
        found = model.generate(ids, **how, **({} if static else {CACHE: caches[1]}))
    assert torch.equal(found, expected)
    assert seen == [(1, 16), (1, 14)] * 5 + [(5, 1)] * 5
    if not static:
        assert [type(layer) for layer in caches[0].layers] == [type(layer) for layer in caches[1].layers]
        new = tokens(5, 3, seed=2)
        torch.testing.assert_close(*(go_on(model, u, new) for u in caches), rtol=0, atol=FAMILIES[name].tolerance)
