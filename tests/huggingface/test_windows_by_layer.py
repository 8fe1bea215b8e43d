"""Windows of different sizes in different layers: every cache holds them, files describe them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ahn_layers import (
    GatedDeltaNet,
    HippocampalAttention,
    SalientSlots,
    full_attention,
    load_adapter,
    memory_report,
    retrofit,
    save_adapter,
    window_only,
)
from ahn_layers.cost import cost_report
from ahn_layers.distillation import distillation_loss, freeze_base, use_window

from ..models import base, logits, tokens, train_memory

WINDOWS, SINKS = {0: 4, 1: 9, 2: 6}, {0: 2, 1: 0, 2: 3}


def made(compressor=GatedDeltaNet, **options):
    """A small model with windows by layer, and a memory that says something."""
    model = retrofit(base(), compressor, **{"window_size": WINDOWS, "num_sinks": SINKS, **options})
    train_memory(model)
    return model


def windows_of(model):
    return {m.layer_idx: m.memory.window for m in model.modules() if isinstance(m, HippocampalAttention)}


def test_each_layer_has_its_window():
    model = made()
    assert {i: (w.window_size, w.num_sinks) for i, w in windows_of(model).items()} == {0: (4, 2), 1: (9, 0), 2: (6, 3)}
    assert model.hippocampus.windows == windows_of(model)
    rows = [line.split()[1:3] for line in memory_report(model).splitlines()[2:5]]
    assert rows == [["4", "2"], ["9", "0"], ["6", "3"]]


def test_every_layer_attends_within_its_own_window():
    """Against a model in which one layer at a time has such a window, and the others see everything."""
    ids, whole = tokens(2, 40), 40
    for layer in WINDOWS:
        one = {i: WINDOWS[i] if i == layer else whole for i in WINDOWS}
        sinks = {i: SINKS[i] if i == layer else 0 for i in WINDOWS}
        mixed = made(None, window_size=one, num_sinks=sinks)
        alone = retrofit(base(), None, window_size=WINDOWS[layer], num_sinks=SINKS[layer], layers=[layer])
        torch.testing.assert_close(logits(mixed, ids), logits(alone, ids), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(logits(mixed, ids), logits(base(), ids))


@pytest.mark.parametrize("compressor, eviction", [(GatedDeltaNet, None), (None, None), (None, SalientSlots(3))])
def test_chunks_and_caches(compressor, eviction):
    model, ids = made(compressor, eviction=eviction), tokens(2, 40)
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, [1, 5, 1, 13, 20]), whole, rtol=1e-9, atol=1e-9)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(ids, **options)
    assert torch.equal(dynamic, model.generate(ids, cache_implementation="static", **options))
    padded, mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1), torch.ones(2, 43, dtype=torch.long)
    mask[:, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 43:], dynamic[:, 40:])


def test_files_know_them(tmp_path):
    model, ids = made(eviction=SalientSlots(3)), tokens(2, 40)
    save_adapter(model, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert described["format_version"] == 3 and described["window_size"] == {"0": 4, "1": 9, "2": 6}
    again = load_adapter(base(), tmp_path / "adapter")
    assert windows_of(again) == windows_of(model)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=0)
    alike = load_adapter(base(), tmp_path / "adapter", window_size=5, num_sinks=1)
    assert alike.hippocampus.window.capacity == 6
    with pytest.raises(ValueError, match="window_size=4: the model is retrofitted already, with window_size=4, 6, 9"):
        load_adapter(made(eviction=SalientSlots(3)), tmp_path / "adapter", window_size=4)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert windows_of(loaded) == windows_of(model)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-9, atol=1e-9)


def test_files_of_more_than_ten_layers_are_intact(tmp_path):
    """A file's keys are texts, and "10" comes before "9"."""
    model = retrofit(base(num_hidden_layers=12), GatedDeltaNet, window_size={i: 4 + i for i in range(12)})
    save_adapter(model, tmp_path)
    assert windows_of(load_adapter(base(num_hidden_layers=12), tmp_path)) == windows_of(model)


def test_equal_sizes_are_written_as_one(tmp_path):
    save_adapter(made(window_size=dict.fromkeys(WINDOWS, 4), num_sinks=2), tmp_path)
    described = json.loads((tmp_path / "adapter.json").read_text())
    assert (described["format_version"], described["window_size"], described["num_sinks"]) == (1, 4, 2)


def test_what_a_mapping_names_is_retrofitted():
    model = retrofit(base(), None, window_size={1: 5})
    assert list(windows_of(model)) == [1]
    for wrong, message in (
        (
            {"window_size": {1: 5}, "layers": [0, 1]},
            r"window_size has sizes for the layers \[1\]: expected one for each",
        ),
        (
            {"window_size": {1: 5}, "num_sinks": {0: 1}},
            r"num_sinks has sizes for the layers \[0\]: expected one for each",
        ),
        ({"window_size": {9: 5}}, "layers: no attention layer 9"),
        ({"window_size": {0: 5, 1: 0}}, "window_size=0: expected a whole number of at least 1"),
    ):
        plain = base()
        with pytest.raises(ValueError, match=message):
            retrofit(plain, None, **wrong)
        assert not windows_of(plain)


def test_losses_count_from_the_smallest_window():
    model, ids = made(), tokens(2, 40)
    freeze_base(model)
    found = distillation_loss(model, ids)
    assert found.tokens == 2 * (40 - 6)
    with full_attention(model), torch.no_grad():
        teacher = model(ids).logits.log_softmax(-1)
    with torch.no_grad():
        student = model(ids).logits.log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1)[:, 6:].mean()
    torch.testing.assert_close(found.divergence.double(), expected, rtol=1e-5, atol=1e-7)
    with window_only(model):
        assert not torch.allclose(logits(model, ids), student)


def test_what_needs_one_window_says_so():
    model = made()
    with pytest.raises(ValueError, match="the layers have 3 different windows: expected one for all"):
        _ = model.hippocampus.window
    with pytest.raises(ValueError, match=r"windows of the capacities \[6, 9\]: the formulas are for equal layers"):
        cost_report(model, [64])


@pytest.mark.parametrize("name", ["mistral_window", "phimoe"])
def test_no_window_is_larger_than_the_layers_own(name):
    """Also one that is given after the retrofit."""
    model, ids = retrofit(base(name), None, window_size=6, num_sinks=2), tokens(1, 30)
    expected = logits(retrofit(base(name), None, window_size=8, num_sinks=1), ids)
    with use_window(model, 8, 1):
        assert torch.equal(logits(model, ids), expected)
    with use_window(model, 9, 1), pytest.raises(ValueError, match="attends to 9 tokens by itself: expected at most 9"):
        logits(model, ids)
    with use_window(model, 9, 1), full_attention(model):
        assert torch.equal(logits(model, ids), logits(base(name), ids))
