"""What the library does with a compressor, once for each: retrofit, files, packed texts, static caches, reports."""

import re

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ahn_layers import GLA, HippocampalCache, adapter_parameters, load_adapter, memory_report, retrofit, save_adapter
from ahn_layers.cost import cost_report, num_gates

from ..methods import COMPRESSORS, OPTIONS

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS)
WINDOW, SINKS, LONG = 6, 2, 40


def base(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def retrofitted(compressor, dtype=torch.float64, **options):
    options = OPTIONS.get(compressor, {}) | options
    model = retrofit(base(dtype), compressor, window_size=WINDOW, num_sinks=SINKS, **options)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(*shape, seed=1):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shared_state", [False, True])
@every_compressor
def test_an_adapter_carries_it(compressor, shared_state, tmp_path):
    model, ids = retrofitted(compressor, shared_state=shared_state), tokens(2, LONG)
    save_adapter(model, tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))


@every_compressor
def test_packed_texts_are_texts_alone(compressor):
    model, texts = retrofitted(compressor), [tokens(1, length, seed=length) for length in (30, 5, 17)]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    together = logits(model, torch.cat(texts, dim=1), position_ids=positions, use_cache=False)
    close(together, torch.cat([logits(model, text) for text in texts], dim=1))


@every_compressor
def test_a_padded_batch_goes_on_as_its_rows_do(compressor):
    model, cache = retrofitted(compressor), DynamicCache()
    rows = [tokens(1, length, seed=length) for length in (LONG, 21)]
    ids, mask = torch.zeros(2, LONG, dtype=torch.long), torch.zeros(2, LONG, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, LONG - row.shape[1] :], mask[i, LONG - row.shape[1] :] = row[0], 1
    place = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for part in (slice(0, 33), *(slice(t, t + 1) for t in range(33, LONG))):
        options = {"attention_mask": mask[:, : part.stop], "position_ids": place[:, part]}
        out = logits(model, ids[:, part], cache=cache, use_cache=True, **options)
    close(out[:, -1], torch.cat([logits(model, row)[:, -1] for row in rows]))


@every_compressor
def test_a_static_cache_is_a_dynamic_one(compressor):
    model, ids = retrofitted(compressor), tokens(2, 20)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(ids, **options))


@every_compressor
def test_a_saved_cache_goes_on_bit_for_bit(compressor, tmp_path):
    model, ids, cache = retrofitted(compressor), tokens(2, LONG), HippocampalCache()
    logits(model, ids[:, :33], cache=cache, use_cache=True)
    cache.save(tmp_path / "cache")
    resumed = HippocampalCache.load(tmp_path / "cache")
    assert torch.equal(*(logits(model, ids[:, 33:], cache=u, use_cache=True) for u in (cache, resumed)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_compressor
def test_reports_say_the_bytes(compressor, dtype):
    model, cache = retrofitted(compressor, dtype), HippocampalCache()
    logits(model, tokens(1, LONG), cache=cache, use_cache=True)
    total = re.search(r"^total .* ([\d,]+)$", memory_report(model), re.MULTILINE)[1]
    assert int(total.replace(",", "")) == cache.nbytes == cost_report(model, [LONG]).rows[0].state_bytes


def test_the_work_of_vectors_is_counted():
    """Of GLA: the read gate, and 4 numbers per state that become 16."""
    memory = GLA(hidden_size=64, num_heads=8, head_dim=16)
    assert num_gates(memory) == 1 + -(-(64 * 8 * 4 + 8 * 4 * 16) // (64 * 8)) == 6
