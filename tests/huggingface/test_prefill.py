"""Long prompts are read in chunks, by default and with the same result."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ahn_layers import GatedDeltaNet, HippocampalCache, adapter_parameters, full_attention, retrofit
from ahn_layers.huggingface import prefill


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = retrofit(LlamaForCausalLM(config).eval(), GatedDeltaNet, window_size=8, num_sinks=2)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)
    return model


def lengths_of_calls(model):
    """The tokens that each forward of the model gets."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("pads", [0, 5])
def test_generate_reads_long_prompts_in_chunks(model, monkeypatch, pads):
    ids = torch.randint(1, 64, (2, 50))
    ids[0, :pads] = 0
    inputs = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, prefill_chunk_size=50, **inputs)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    seen = lengths_of_calls(model)
    assert torch.equal(model.generate(ids, **inputs), expected)
    assert seen == [16, 16, 16, 2] + [1] * 5
    seen.clear()
    assert torch.equal(model.generate(ids, prefill_chunk_size=30, **inputs), expected)
    assert seen[:2] == [30, 20], "a size that the caller asks for is kept"


@pytest.mark.parametrize("cuts", [prefill.CUTS_BEHIND_A_CACHE, False])
@pytest.mark.parametrize("pads", [0, 5])
def test_behind_a_cache_only_what_is_new_is_read_in_chunks(model, monkeypatch, pads, cuts):
    """Whether transformers cuts it (5.24) or would begin again with the first token (5.17, 5.20)."""
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(prefill, "SHORTEST_CHUNK", 8)
    monkeypatch.setattr(prefill, "CUTS_BEHIND_A_CACHE", cuts)
    ids = torch.randint(1, 64, (2, 90))
    ids[0, :pads] = 0
    mask, options = (ids != 0).long(), {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, prefill_chunk_size=90, **options)
    cache = HippocampalCache()
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids[:, :40], attention_mask=mask[:, :40], position_ids=positions[:, :40], cache=cache, use_cache=True)
    seen = lengths_of_calls(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=cache, **options), expected)
    assert seen == [16, 16, 16, 2, 1, 1, 1] and cache.get_seq_length() == 93


def test_rows_share_a_chunk(model, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 48)
    monkeypatch.setattr(prefill, "SHORTEST_CHUNK", 10)
    ids, options = torch.randint(1, 64, (8, 50)), {"max_new_tokens": 2, "do_sample": False}
    expected = model.generate(ids, prefill_chunk_size=50, **options)
    seen = lengths_of_calls(model)
    for rows, sizes in ((1, [48, 2]), (2, [24, 24, 2]), (4, [12] * 4 + [2]), (8, [10] * 5)):
        seen.clear()
        assert torch.equal(model.generate(ids[:rows], **options), expected[:rows])
        assert seen == [*sizes, 1]
    seen.clear()
    model.generate(ids[:2], num_beams=2, **options)
    assert seen[:5] == [12] * 4 + [2]


def test_full_attention_and_embeddings_are_not_cut(model, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    ids = torch.randint(1, 64, (1, 50))
    seen = lengths_of_calls(model)
    with full_attention(model):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert seen == [50, 1]
    model.model._forward_pre_hooks.clear()
    embeddings = model.get_input_embeddings()(ids)
    from_ids = model.generate(ids, max_new_tokens=4, do_sample=False)[:, 50:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=4, do_sample=False), from_ids)
