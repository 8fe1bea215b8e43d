"""Retrofitting a model of transformers, what else can be done to it then, and taking it back."""

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from ahn_layers import Compressor, GatedDeltaNet, full_attention, memory_report, restore, retrofit, window_only
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.record import find_retrofitted
from ahn_layers.retrofit import memory_attention

from ..models import (
    CAPACITY,
    SINKS,
    SIZES,
    WINDOW,
    base,
    generate,
    greedy,
    logits,
    positions,
    retrofitted,
    tokens,
    train_memory,
)
from .retrofits import LONG, blocks, same_memory


def weights(model):
    return {name: u.clone() for name, u in model.state_dict().items()}


def same_weights(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(u, before[name]) for name, u in after.items())


def rows_of(report):
    head, line, *rows = report.splitlines()
    assert set(line) == {"-"} and len(line) == len(head)
    table = [
        [cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows if not row.startswith("skipped")
    ]
    return table, [row for row in rows if row.startswith("skipped")]


def test_the_report_is_what_the_layers_hold():
    model = retrofitted("llama", layers=[0, 2])
    table, skipped = rows_of(memory_report(model))
    cache = model(tokens(1, LONG)).past_key_values
    sizes = [cache.layers[i].nbytes for i in (0, 2)]
    parameters = [sum(p.numel() for p in block.memory.parameters()) for block in blocks(model)]
    assert table == [
        ["model.layers.0.self_attn", "6", "2", "GatedDeltaNet", f"{parameters[0]:,}", f"{sizes[0]:,}"],
        ["model.layers.2.self_attn", "6", "2", "GatedDeltaNet", f"{parameters[1]:,}", f"{sizes[1]:,}"],
        ["total", f"{sum(parameters):,}", f"{sum(sizes):,}"],
    ]
    assert skipped == ["skipped model.layers.1.self_attn: not among the layers asked for"]


def test_the_report_without_a_compressor_and_of_a_model_in_low_precision():
    model = retrofitted("gemma3", torch.bfloat16, compressor=None, window_size=1200)
    table, skipped = rows_of(memory_report(model))
    size = 2 * 2 * (1200 + SINKS) * 8 * 2 + 8  # keys and values, 2 heads of 8, 2 bytes; the number of tokens
    assert table[0] == ["model.layers.1.self_attn", "1,200", "2", "none", "0", f"{size:,}"]
    assert skipped == [f"skipped model.layers.{i}.self_attn: has a sliding window of its own" for i in (0, 2)]
    assert memory_report(nn.ModuleList([model])) == memory_report(model), "inside a wrapper"


def test_the_report_names_why_a_sliding_window_is_too_small():
    with pytest.raises(ValueError, match=r"own sliding window of 9 is smaller than num_sinks \+ window_size = 10"):
        retrofitted("mistral_window", window_size=8)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [2, 1]])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_some_layers(name, layers):
    model, ids = retrofitted(name, layers=layers), tokens(2, LONG)
    assert [block.layer_idx for block in blocks(model)] == sorted(layers)
    expected = logits(model, ids)
    for cuts in (1, [CAPACITY + 1, 1, LONG - CAPACITY - 2]):
        torch.testing.assert_close(logits(model, ids, cuts), expected, rtol=0, atol=1e-9)
    for other in (base(name), retrofitted(name)):
        assert (logits(other, ids) - expected).abs().max() > 1e-3
    assert torch.equal(generate(model, ids), greedy(model, ids, 8))


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_some_layers_of_a_padded_batch(name):
    model, ids = retrofitted(name, layers=[0, 2]), tokens(3, LONG)
    ids[1, :4], ids[2, :17] = 0, 0
    mask = (ids != 0).long()
    together = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    texts = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(ids):
        alone = row[row != 0][None]
        expected = logits(model, alone)[0]
        torch.testing.assert_close(together[i, -len(expected) :], expected, rtol=0, atol=1e-9)
        assert torch.equal(texts[i, LONG:], generate(model, alone)[0, alone.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_some_layers_and_a_static_cache(name):
    """The mask is that of the other layers too; it is read where the model is not compiled."""
    model, ids = retrofitted(name, layers=[0, 2]), tokens(2, LONG)
    for length in (3, LONG):
        short, mask = ids[:, :length], torch.ones(2, length, dtype=torch.long)
        mask[0, 0] = 0
        static = generate(model, short, attention_mask=mask, cache_implementation="static")
        assert torch.equal(static, generate(model, short, attention_mask=mask))
    with full_attention(model):
        assert torch.equal(generate(model, ids, cache_implementation="static"), generate(base(name), ids))


def test_all_full_layers_beside_sliding_ones_may_have_a_static_cache():
    model, ids = retrofitted("gemma3", layers=[1]), tokens(2, LONG)
    assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


class Broken(Compressor):
    """Can be made twice, and not once more."""

    made = 0

    def build(self):
        Broken.made += 1
        if Broken.made == 3:
            raise RuntimeError("no third one")

    def fold(self, state, k, v):
        return state


@pytest.mark.parametrize(
    "options",
    [
        {"compressor": Broken},
        {"layers": [0, 7]},
        {"compressor": GatedDeltaNet, "no_such_option": 1},
        {"compressor": None, "num_sink": 2},
        {"window_size": {}},
        {"window_size": 0},
        {"compressor": GatedDeltaNet(32, 4, 8)},
    ],
    ids=str,
)
def test_a_retrofit_that_fails_changes_nothing(options, unchecked):
    Broken.made = 0
    model, plain, ids = base(), base(), tokens(1, LONG)
    modules, before = dict(model.named_modules()), weights(model)
    attributes, config = set(model.__dict__), model.config.to_dict()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        retrofit(model, **{"compressor": GatedDeltaNet, "window_size": WINDOW} | options)
    assert dict(model.named_modules()) == modules and same_weights(model, before)
    assert set(model.__dict__) == attributes and model.config.to_dict() == config
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_training_mode_is_left_as_it_was():
    model = base()
    model.model.layers[1].train()
    before = {name: module.training for name, module in model.named_modules()}
    retrofitted(model=model)
    assert {name: m.training for name, m in model.named_modules() if ".memory" not in name} == before
    restore(model)
    assert {name: m.training for name, m in model.named_modules()} == before


def test_switches_nest():
    model, ids = retrofitted(), tokens(1, LONG)
    memory, full = logits(model, ids), logits(base(), ids)
    window = logits(retrofitted(compressor=None), ids)
    with full_attention(model):
        with window_only(model):
            with memory_attention(model):
                assert torch.equal(logits(model, ids), memory)
            assert torch.equal(logits(model, ids), window)
            with full_attention(model):
                assert torch.equal(logits(model, ids), full)
            assert torch.equal(logits(model, ids), window)
        assert torch.equal(logits(model, ids), full)
    assert torch.equal(logits(model, ids), memory)


@pytest.mark.parametrize("switch", [full_attention, window_only, memory_attention])
@pytest.mark.parametrize("around", [lambda model: nullcontext(), full_attention, window_only])
def test_an_exception_ends_the_switch(switch, around):
    model, ids = retrofitted(), tokens(1, LONG)
    memory = logits(model, ids)
    with around(model):
        expected = logits(model, ids)
        with pytest.raises(KeyError), switch(model):
            raise KeyError
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), memory)
    assert {block.mode for block in blocks(model)} == {"memory"}


def test_switches_that_overlap_end():
    """Those of two threads, say: the last one to end leaves the memory on."""
    model, ids = retrofitted(), tokens(1, LONG)
    memory, full = logits(model, ids), logits(base(), ids)
    one, other = window_only(model), full_attention(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(logits(model, ids), full)
    other.__exit__(None, None, None)
    assert torch.equal(logits(model, ids), memory)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
@pytest.mark.parametrize("switch", [full_attention, window_only])
def test_a_copy_made_within_a_switch_has_its_memory(switch, duplicate):
    model, ids = retrofitted(), tokens(1, LONG)
    memory = logits(model, ids)
    with switch(model):
        other = COPIES[duplicate](model)
        assert torch.equal(logits(other, ids), memory)
        assert not torch.equal(logits(model, ids), memory)
    assert torch.equal(logits(other, ids), memory) and torch.equal(logits(model, ids), memory)


def test_a_switch_of_one_model_is_not_that_of_another():
    one, other, ids = retrofitted(), retrofitted(), tokens(1, LONG)
    expected = logits(other, ids)
    with full_attention(one):
        assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(one, ids), expected)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_whole_and_independent(name, duplicate):
    model, ids = retrofitted(name), tokens(2, LONG)
    expected, text = logits(model, ids), generate(model, ids)
    other = duplicate(model)
    assert torch.equal(logits(other, ids), expected) and torch.equal(generate(other, ids), text)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}
    train_memory(other, seed=1)
    assert torch.equal(logits(model, ids), expected)
    assert (logits(other, ids) - expected).abs().max() > 1e-3
    changed = generate(other, ids)
    assert torch.equal(changed, greedy(other, ids, 8)), "its own cache is made for its own blocks"
    with full_attention(other):
        assert torch.equal(logits(model, ids), expected), "switches are its own"
    restore(other)
    assert torch.equal(logits(other, ids), logits(base(name), ids))
    assert torch.equal(logits(model, ids), expected) and torch.equal(generate(model, ids), text)


def test_a_pickled_model_runs_in_a_new_process(tmp_path):
    model, ids = retrofitted(), tokens(2, LONG)
    given = (model, ids, logits(model, ids), generate(model, ids), generate(base(), ids))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(given))
    code = """if True:
        import pickle, sys, torch
        torch.set_num_threads(1)
        with open(sys.argv[1], "rb") as file:
            model, ids, logits, text, full = pickle.load(file)
        from ahn_layers import full_attention, restore
        run = lambda **options: model.generate(ids, max_new_tokens=8, do_sample=False, **options)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        assert torch.equal(run(), text) and torch.equal(run(cache_implementation="static"), text)
        with full_attention(model):
            assert torch.equal(run(), full)
        restore(model)
        assert torch.equal(run(), full)
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pickle")], check=True)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_another_dtype_after_the_retrofit(cast):
    """The model as a whole, the memory's state in float32, the frequencies as the base rounds its own."""
    model, ids = (
        retrofitted(dtype=torch.float32, model=base(max_position_embeddings=12, dtype=torch.float32)),
        tokens(2, LONG),
    )
    exact = logits(model, ids)
    cast(model)
    dtype = model.dtype
    assert {p.dtype for p in model.parameters()} == {dtype} and dtype.itemsize == 2
    assert torch.equal(blocks(model)[0].memory.rotary.inv_freq, model.model.rotary_emb.inv_freq.float())
    out = model(ids)
    assert {layer.keys.dtype for layer in out.past_key_values.layers} == {dtype}
    assert {layer.state.memory.dtype for layer in out.past_key_values.layers} == {torch.float32}
    assert (out.logits.float() - exact).abs().max() < 0.15 * exact.abs().max()
    assert generate(model, ids).shape == (2, LONG + 8)
    assert torch.equal(logits(model, ids[:, :CAPACITY]), logits(cast(base(dtype=torch.float32)), ids[:, :CAPACITY]))


def test_to_float64_and_back_is_exact():
    model, ids = retrofitted(dtype=torch.float32), tokens(2, LONG)
    expected = logits(model, ids)
    assert (logits(model.double(), ids) - expected).abs().max() < 1e-4
    assert torch.equal(logits(model.float(), ids), expected)


def test_a_state_dict_goes_round():
    model, other, ids = retrofitted(), retrofitted(), tokens(1, LONG)
    train_memory(other, seed=1)
    assert not same_memory(model, other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_what_the_record_says():
    model = retrofitted(shared_state=True, layers=[1], sink_positions="streaming")
    record = find_retrofitted(model)[1]
    assert (record.window.capacity, record.window.sink_positions) == (CAPACITY, "streaming")
    assert (record.compressor, record.options, record.layers) == ("GatedDeltaNet", {"shared_state": True}, [1])
    assert record.owned == "none" and set(record.skipped) == {"model.layers.0.self_attn", "model.layers.2.self_attn"}
    cache = model(tokens(1, LONG)).past_key_values
    assert [isinstance(layer, MemoryLayer) for layer in cache.layers] == [False, True, False]


@pytest.mark.parametrize("sliding_window", [None, 40])
def test_a_model_without_values_can_be_counted_but_not_run(sliding_window):
    """On the meta device the rotation cannot be found, so the sinks would stay at their true distance."""
    with torch.device("meta"):
        empty = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=sliding_window))
    retrofit(empty, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    assert "bytes per sequence" in memory_report(empty)
    empty.to_empty(device="cpu")
    with pytest.raises(ValueError, match="was retrofitted on the meta device"):
        empty(tokens(1, 4))
