"""Evictions in a retrofitted model: one pass, pieces, padding, saved caches, ``generate``, tokens taken back."""

import pytest
import torch

from ahn_layers import HippocampalCache, SalientSlots

from ..methods import BiggestKeys
from ..models import generate, logits, retrofitted, tokens

POLICIES = {
    "largest keys": lambda: BiggestKeys(6),
    "salient, learned": lambda: SalientSlots(6),
    "salient, by values": lambda: SalientSlots(6, score="value_norm", rate=0.02, positions="absolute"),
}


@pytest.fixture(params=POLICIES)
def with_slots(request):
    """A retrofitted model whose stores keep some tokens."""
    return retrofitted(eviction=POLICIES[request.param]())


@torch.no_grad()
def test_in_a_retrofitted_model(tmp_path, with_slots):
    model, ids = with_slots, tokens(2, 60)
    whole = logits(model, ids)
    assert (whole - logits(retrofitted(), ids)).abs().max() > 1e-3
    for cuts in (1, [20, 40], [7, 1, 52]):
        torch.testing.assert_close(logits(model, ids, cuts), whole, rtol=0, atol=1e-9)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    place = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits
    torch.testing.assert_close(padded[:1, 9:], logits(model, ids[:1, 9:]), rtol=0, atol=1e-9)
    cache = HippocampalCache()
    logits(model, ids[:, :50], 25, cache)
    cache.save(tmp_path / "cache.safetensors")
    rest = logits(model, ids[:, 50:], 5, HippocampalCache.load(tmp_path / "cache.safetensors"))
    torch.testing.assert_close(rest, whole[:, 50:], rtol=0, atol=1e-9)


def test_generate_with_every_cache(with_slots):
    model, ids = with_slots, tokens(2, 40)
    expected = generate(model, ids, 20)
    for options in (
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 7},
        {"num_beams": 1, "use_cache": False},
    ):
        assert torch.equal(generate(model, ids, 20, **options), expected), options
    beams = generate(model, ids, 12, num_beams=3)
    assert torch.equal(generate(model, ids, 12, num_beams=3, use_cache=False), beams)


@torch.no_grad()
def test_tokens_are_taken_back_with_their_slots(with_slots):
    model, ids = with_slots, tokens(1, 60)
    assert torch.equal(generate(model, ids[:, :40], 20, prompt_lookup_num_tokens=3), generate(model, ids[:, :40], 20))
    cache = HippocampalCache()
    logits(model, ids[:, :40], 20, cache)
    cache.activate_past_recording()
    logits(model, ids[:, 40:50].flip(1), 5, cache)
    cache.crop(-10)
    rest = logits(model, ids[:, 40:], 5, cache)
    torch.testing.assert_close(rest, logits(model, ids)[:, 40:], rtol=0, atol=1e-9)
