"""Rows join and leave where a convolution or a recurrence stands beside the memory, or in place of it."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ahn_layers import GatedDeltaNet, HippocampalCache, retrofit
from ahn_layers.huggingface.layer_values import tensors_of
from ahn_layers.huggingface.linear_rows import linear_of

from ..families.cases import build
from ..families.checks import CAPACITY, SINKS, WINDOW
from ..models import CACHE, retrofitted, tokens, train_memory
from .recurrent import caught, go_on, held, read

IN_FLOAT32 = {"nemotron_h", "bailing_hybrid", "kimi_linear"}
"""Types that compute in float32, whatever the dtype of their weights."""
TYPES = [
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "lfm3",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "zaya",
]  # fmt: skip
BESIDE = ["falcon_h1", "lfm2"]  # the memory; in place of it
BATCH = Path(__file__).parents[2] / "examples" / "serving" / "batch.py"
LENGTHS = (2, CAPACITY + 20, CAPACITY - 4, 9)
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module", autouse=True)
def without_kernels():
    """Those of flash-linear-attention need a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla", None)
        yield


def of_type(name):
    model = build(name).model
    retrofit(model, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    train_memory(model)
    return model


@pytest.mark.parametrize("name", TYPES)
def test_rows_join_are_replaced_and_leave(name):
    """Step by step the logits are those of each row alone."""
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not know it")
    model, new = of_type(name), tokens(4, 10, seed=5)
    alone = [go_on(model, read(model, LENGTHS[i], seed=i), new[i : i + 1]) for i in range(4)]
    caches = [read(model, LENGTHS[i], seed=i) for i in range(4)]
    before = [held(cache) for cache in caches]
    tolerance = 2e-5 if name in IN_FLOAT32 else 1e-9
    grows = name == "lfm3"  # it has a sliding layer
    for size in (None,) if grows else (None, 3):
        batch = HippocampalCache.join(caches[:3], rows=size)
        found = [go_on(model, batch, new[:3, :4])]
        expected = [torch.cat([alone[i][:, :4] for i in range(3)])]
        batch.put(1, caches[3])
        found.append(go_on(model, batch, torch.cat((new[:1, 4:8], new[3:, :4], new[2:3, 4:8]))))
        expected.append(torch.cat((alone[0][:, 4:8], alone[3][:, :4], alone[2][:, 4:8])))
        left = batch.take([2, 1])
        found.append(go_on(model, left, torch.cat((new[2:3, 8:], new[3:, 4:6]))))
        expected.append(torch.cat((alone[2][:, 8:], alone[3][:, 4:6])))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    assert all(held(cache) == was for cache, was in zip(caches, before, strict=True)), "they stay as they are"
    if grows:
        with pytest.raises(ValueError, match=r"layers \[2\] are not retrofitted"):
            HippocampalCache.join(caches, rows=4)


@pytest.mark.parametrize("size", [None, 5], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", BESIDE)
def test_taken_rows_are_what_was_joined(name, size):
    """Bit for bit, and nothing is shared."""
    model = retrofitted(name)
    caches = [read(model, length, seed=i) for i, length in enumerate((1, 23, 6))]
    joined = HippocampalCache.join(caches, rows=size)
    assert joined.joined and joined.get_seq_length() == 23
    for row, i in enumerate((0, 1, 2) if size is None else (0, 1, 2, 2, 2)):
        taken = joined.take(row)
        assert held(taken) == held(caches[i]) and taken.get_seq_length() == caches[i].get_seq_length()
        for one, other in ((taken, joined), (joined, caches[i]), (HippocampalCache.join(caches[:1]), caches[0])):
            pointers = [{u.data_ptr() for layer in c.layers for u in tensors_of(layer).values()} for c in (one, other)]
            assert not pointers[0] & pointers[1] - {0}
    addresses = [u.data_ptr() for layer in joined.layers for u in tensors_of(linear_of(layer) or layer).values()]
    joined.put([2, 0], HippocampalCache.join(caches[:2]))
    assert held(joined.take(2)) == held(caches[0]) and held(joined.take(0)) == held(caches[1])
    if size is not None:
        now = [u.data_ptr() for layer in joined.layers for u in tensors_of(linear_of(layer) or layer).values()]
        assert now == addresses


@pytest.mark.parametrize("name", [*BESIDE, "nemotron_h"])
def test_joined_rows_are_a_value(name, tmp_path):
    """Copied, saved and reordered as any cache; not cropped."""
    model = of_type(name) if name == "nemotron_h" else retrofitted(name)
    caches, new = [read(model, length, seed=i) for i, length in enumerate((4, 23))], tokens(2, 5, seed=8)
    for size in (None, 2):
        joined = HippocampalCache.join(caches, rows=size)
        joined.save(tmp_path / "joined")
        copies = [HippocampalCache.load(tmp_path / "joined"), joined.clone(), HippocampalCache.join([joined])]
        turned = joined.reorder(torch.tensor([1, 0]))
        before = held(joined)
        with pytest.raises(RuntimeError, match="crop"):
            joined.crop(-1)
        assert held(joined) == before
        expected = go_on(model, joined, new)
        for copy in copies:
            torch.testing.assert_close(go_on(model, copy, new), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(go_on(model, turned, new.flip(0)), expected.flip(0), rtol=0, atol=1e-5)


def changed(change):
    """A cache of LFM2 in which its first convolution has been changed."""
    cache = read(retrofitted("lfm2"), 5)
    change(cache.layers[0])
    return cache


STRANGERS = {
    "layer 0: its convolution or recurrence holds .*float64": lambda: changed(
        lambda layer: layer.conv_states.update({0: layer.conv_states[0].float()})
    ),
    "layer 0: its convolution or recurrence holds .*False": lambda: changed(
        lambda layer: layer.has_previous_state.update({0: False})
    ),
    "layer 0: its convolution or recurrence holds .*32, 2": lambda: changed(
        lambda layer: vars(layer).update(conv_states={0: layer.conv_states[0][..., 1:]}, conv_kernel_size={0: 2})
    ),
    "layer 0 is a LinearAttentionLayer in one cache and a MemoryLayer": lambda: read(retrofitted(), 5),
}  # fmt: skip


@pytest.mark.parametrize("match", STRANGERS)
def test_what_does_not_fit_changes_nothing(match):
    cache, stranger = HippocampalCache.join([read(retrofitted("lfm2"), 5), read(retrofitted("lfm2"), 20)]), None
    stranger = STRANGERS[match]()
    before, its = held(cache), held(stranger)
    for act in (lambda: cache.put(1, stranger), lambda: HippocampalCache.join([cache, stranger])):
        with pytest.raises(ValueError, match=match):
            act()
    assert held(cache) == before and held(stranger) == its


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_an_emptied_cache_takes_another_number_of_rows(name, recording):
    model, cache = retrofitted(name), read(retrofitted(name), 20, recording=recording)
    cache.reset()
    ids, fresh = tokens(3, 12, seed=1), HippocampalCache()
    with torch.no_grad():
        found, expected = (model(ids, use_cache=True, **{CACHE: u}).logits for u in (cache, fresh))
    assert torch.equal(found, expected)
    assert torch.equal(go_on(model, cache, tokens(3, 4)), go_on(model, fresh, tokens(3, 4)))


def test_a_joined_cache_that_cannot_be_emptied_stays_as_it_is():
    cache = HippocampalCache.join([read(retrofitted("lfm2"), 5)], rows=2)
    before = held(cache)
    with pytest.raises(RuntimeError, match="never empty"):
        cache.reset()
    assert held(cache) == before and cache.layers[0].has_previous_state[0]


def test_a_model_that_keeps_its_recurrence_in_its_modules_is_refused():
    """Rows of the cache would go on with whatever the model read last."""
    model = of_type("recurrent_gemma")
    one, two = read(model, 9), read(model, 5)
    for act in (lambda: one.take(0), lambda: one.put(0, two), lambda: HippocampalCache.join([one, two])):
        with pytest.raises(ValueError, match=r"layers \[0, 1\] of the cache hold nothing.*Expected.*read one batch"):
            act()


@pytest.mark.parametrize("recording", ["the one", "the other"])
def test_a_convolution_that_records_its_past(recording):
    """What it keeps for ``crop`` is not joined; tokens of before a row was put in are not taken back."""
    model, new = retrofitted("lfm2", window_size=60), tokens(2, 4, seed=3)
    one, other = (read(model, 12, seed=i, recording=who == recording) for i, who in enumerate(("the one", "the other")))
    expected = [go_on(model, read(model, 12, seed=i), new[i : i + 1]) for i in range(2)]
    found = go_on(model, HippocampalCache.join([one, other]), new)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-9)
    one.put(0, other)
    assert caught(lambda: one.crop(-2), RuntimeError)
    torch.testing.assert_close(go_on(model, one, new[1:]), expected[1], rtol=0, atol=1e-9)
    if recording == "the one":
        one.crop(-3)
        torch.testing.assert_close(go_on(model, one, new[1:, 1:]), expected[1][:, 1:], rtol=0, atol=1e-9)


def test_a_recurrence_records_no_past():
    """Its cache says so when it is asked to take tokens back; copies go on as it does."""
    model, new = retrofitted("falcon_h1"), tokens(1, 4, seed=3)
    cache = read(model, 12, recording=True)
    copies = [cache.clone(), cache.take(0)]
    expected = go_on(model, read(model, 12), new)
    for one in (cache, *copies):
        torch.testing.assert_close(go_on(model, one, new), expected, rtol=0, atol=1e-5)
    assert all(layer.conv_states[0].shape[-1] == layer.conv_kernel_size[0] for layer in cache.layers)


@pytest.mark.parametrize("fixed", [False, True], ids=["as needed", "fixed"])
@pytest.mark.parametrize("name", BESIDE)
def test_a_server_decodes_requests_together(name, fixed):
    """Requests of all lengths join and leave the engine's batch between any two steps."""
    model, size = retrofitted(name), 3
    lengths, counts, begins = (3, 30, 8, 17, 1), (9, 4, 6, 3, 7), (0, 0, 2, 5, 8)
    batch, said, caches = runpy.run_path(str(BATCH))["Batch"](model, size, fixed=fixed), {i: [] for i in range(5)}, {}
    for t in range(16):
        for i in [i for i in range(5) if begins[i] == t]:
            batch.join(i, read(model, lengths[i], seed=i), int(tokens(1, 1, seed=20 + i)))
        if not batch.active:
            continue
        with torch.no_grad():
            logits = batch.step()
        found = {batch.users[row]: logits[row] for row in batch.active}
        for i, row in found.items():
            said[i].append(row)
            batch.tokens[batch.users.index(i)] = int(row.argmax())
        for i in [i for i in found if len(said[i]) == counts[i]]:
            caches[i] = batch.leave(i, keep=True)
    for i, count in enumerate(counts):
        cache, token = read(model, lengths[i], seed=i), tokens(1, 1, seed=20 + i)
        for row in said[i]:
            with torch.no_grad():
                expected = model(token, use_cache=True, **{CACHE: cache}).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-9 if name == "lfm2" else 2e-4)
            token = expected.argmax().view(1, 1)
        assert len(said[i]) == count and caches[i].get_seq_length() == cache.get_seq_length()
