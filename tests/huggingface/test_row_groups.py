"""On a GPU a batch of prompts is read a few rows at a time: the cache and the tokens are those of one reading."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ahn_layers import GatedDeltaNet, HippocampalCache, SalientSlots, adapter_parameters, retrofit
from ahn_layers.huggingface import prefill

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0, "head_dim": 8}
HOW = {"max_new_tokens": 6, "do_sample": False}


def make(window=8, *, sliding=False, **options):
    torch.manual_seed(1)
    if sliding:
        kinds = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**SIZES, num_hidden_layers=2, layer_types=kinds, sliding_window=6)
        model = Gemma3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    retrofit(model.double().eval(), GatedDeltaNet, window_size=window, num_sinks=2, **options)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Choices as on a GPU, with pieces of 16 tokens for one row."""

    def begin(at_once=32):
        monkeypatch.setattr(prefill.Prefill, "_is_on_gpu", lambda self: True)
        for name, size in (("GPU_PREFILL_CHUNK", 16), ("PREFILL_CHUNK", 16), ("GPU_AT_ONCE", at_once)):
            monkeypatch.setattr(prefill, name, size)
        monkeypatch.setattr(prefill, "SHORTEST_CHUNK", 4)

    return begin


def shapes_of_calls(model):
    """Rows and tokens that each forward of the model gets."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def held(cache):
    """What every layer holds, and the padding that it remembers."""
    found = {}
    for i, layer in enumerate(cache.layers):
        state = getattr(layer, "state", None)
        tensors = {"k": layer.keys, "v": layer.values} if state is None else state.tensors()
        found |= {f"{i}.{name}": u for name, u in tensors.items()}
    return found, [getattr(layer, "padding", None) for layer in cache.layers], int(cache.get_seq_length())


@pytest.mark.parametrize(
    ("window", "options", "pads"),
    [
        (8, {}, 0),
        (8, {}, 7),
        (8, {"eviction": SalientSlots(3, score="key_norm")}, 3),
        (100, {}, 0),
        (100, {}, 7),
        (8, {"sliding": True}, 0),
        (8, {"sliding": True}, 7),
    ],
)  # fmt: skip
def test_a_batch_is_read_in_groups(as_on_a_gpu, window, options, pads):
    model, ids = make(window, **options), torch.randint(1, 64, (5, 30))
    ids[3, :pads] = 0
    mask = (ids != 0).long()
    expected, before = HippocampalCache(), {}
    before["ids"] = model.generate(ids, attention_mask=mask, cache=expected, **HOW)
    as_on_a_gpu()
    seen, cache = shapes_of_calls(model), HippocampalCache()
    found = model.generate(ids, attention_mask=mask, cache=cache, **HOW)
    assert torch.equal(found, before["ids"])
    inside = [(1, 30)] if window == 100 else [(1, 16), (1, 14)]
    pieces = {row: [(1, 16), (1, 14)] if row == 3 and pads else inside for row in range(5)}
    assert seen == [shape for row in range(5) for shape in pieces[row]] + [(5, 1)] * 5
    (mine, paddings, length), (its, other_paddings, other_length) = held(cache), held(expected)
    assert mine.keys() == its.keys() and paddings == other_paddings and length == other_length
    for name, u in mine.items():
        torch.testing.assert_close(u, its[name], msg=name)
    assert not cache.joined


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}, {}])
@pytest.mark.parametrize("cache", ["static", None])
def test_short_prompts_share_a_reading(as_on_a_gpu, how, cache):
    model, ids, how = make(), torch.randint(1, 64, (4, 7)), HOW | how
    expected = []
    for begin in (lambda: None, as_on_a_gpu):
        begin()
        torch.manual_seed(3)
        expected.append(model.generate(ids, cache_implementation=cache, **how))
    assert torch.equal(*expected)
    seen, rows = shapes_of_calls(model), 4 * max(how.get("num_beams", 1), how.get("num_return_sequences", 1))
    model.generate(ids, cache_implementation=cache, **how)
    assert seen[: rows // 2] == [(2, 7)] * (rows // 2) and seen[rows // 2] == (rows, 1)


def test_a_model_that_returns_the_logits_of_all_tokens(as_on_a_gpu, monkeypatch):
    """Its last pieces differ: the last group has fewer rows."""
    model, ids = make(), torch.randint(1, 64, (5, 7))
    expected = model.generate(ids, **HOW)
    monkeypatch.setattr(type(model), "_supports_logits_to_keep", lambda self: False)
    as_on_a_gpu(at_once=0)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 10)
    seen = shapes_of_calls(model)
    assert torch.equal(model.generate(ids, **HOW), expected)
    assert seen[:5] == [(2, 5), (2, 2)] * 2 + [(1, 7)]


def test_a_conversation_goes_on(as_on_a_gpu):
    model, ids = make(), torch.randint(1, 64, (3, 20))
    more, texts = torch.randint(1, 64, (3, 9)), []
    for begin in (lambda: None, as_on_a_gpu):
        begin()
        cache = HippocampalCache()
        first = model.generate(ids, cache=cache, **HOW)
        texts.append(model.generate(torch.cat((first, more), dim=1), cache=cache, **HOW))
        texts.append(model.generate(torch.cat((first, more), dim=1)[:, :20], **HOW, return_dict_in_generate=True))
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1].sequences, texts[3].sequences)


def test_rows_are_read_together_where_they_must_be(as_on_a_gpu):
    model, ids = make(), torch.randint(1, 64, (3, 20))
    as_on_a_gpu()
    seen = shapes_of_calls(model)
    recording = HippocampalCache()
    recording.activate_past_recording()
    cases = [
        {"cache": recording},
        {"prefill_chunk_size": 11},
        {"cache_implementation": "static", "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ]
    for case in cases:
        seen.clear()
        model.generate(ids, **HOW, **case)
        assert seen[0][0] == 3, case


def test_a_model_that_returns_more_reads_all_rows_together(as_on_a_gpu):
    model, ids = make(), torch.randint(1, 64, (3, 20))
    expected = model.generate(ids, **HOW)

    def add(module, args, out):
        out["loss"] = torch.zeros(())
        return out

    model.register_forward_hook(add)
    as_on_a_gpu()
    seen, cache = shapes_of_calls(model), HippocampalCache()
    assert torch.equal(model.generate(ids, cache=cache, **HOW), expected)
    rows = [shape[0] for shape in seen]
    assert rows == [1] * (len(rows) - 9) + [3] * 9 and len(rows) > 9 and cache.get_seq_length() == 25


def test_a_reading_that_breaks_off_leaves_the_cache_empty(as_on_a_gpu):
    model, ids, cache = make(), torch.randint(1, 64, (3, 20)), HippocampalCache()
    expected = model.generate(ids, **HOW)
    as_on_a_gpu()
    calls = iter(range(10))

    def fail(*_):
        if next(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, cache=cache, **HOW)
    hook.remove()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(ids, cache=cache, **HOW), expected)
