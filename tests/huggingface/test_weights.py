"""Attention weights: those of the base model inside the window, an error beyond it."""

import copy

import pytest
import torch
from transformers import StaticCache

from ahn_layers import GatedDeltaNet, full_attention, restore, retrofit
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, SINKS, WINDOW, base, generate, logits, positions, retrofitted, tokens

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "deepseek_v3", "smollm3", "mixtral"]


def pair(name="llama", attention="eager", **options):
    """A base model and the same one retrofitted; float32, in which eager masks rows of pads are finite."""
    plain = base(name, torch.float32)
    plain.set_attn_implementation(attention)
    return plain, retrofitted(model=copy.deepcopy(plain), **options)


@torch.no_grad()
def weights(model, ids, **options):
    return model(ids, output_attentions=True, **options).attentions


def same(found, expected, real=None):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        if real is not None:
            one, other = one[real[:, None].expand(one.shape[:-1])], other[real[:, None].expand(other.shape[:-1])]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_inside_the_window_they_are_the_base_models(name):
    plain, model = pair(name)
    ids = tokens(2, CAPACITY)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 4] = 0, 0
    padding = {"attention_mask": mask, "position_ids": positions(mask)}
    same(weights(model, ids, use_cache=False), weights(plain, ids, use_cache=False))
    same(weights(model, ids), weights(plain, ids))
    same(weights(model, ids, **padding), weights(plain, ids, **padding), mask.bool())
    ours, theirs = None, None
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        options = {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
        new = ids[:, start:stop]
        with torch.no_grad():
            one = model(new, **{CACHE: ours}, output_attentions=True, **options)
            other = plain(new, **{CACHE: theirs}, output_attentions=True, **options)
        ours, theirs = one[CACHE], other[CACHE]
        same(one.attentions, other.attentions, mask[:, start:stop].bool())
    if name != "deepseek_v3":
        assert torch.equal(logits(model, ids), logits(plain, ids))


def test_sdpa_has_none_as_in_the_base():
    plain, model = pair(attention="sdpa")
    assert weights(plain, tokens(1, 4)) == weights(model, tokens(1, 4)) == ()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_beyond_the_window_they_are_an_error_before_anything_is_taken_in(attention):
    _, model = pair(attention=attention)
    ids = tokens(2, CAPACITY + 1)
    for options in ({"use_cache": False}, {}):
        with pytest.raises(ValueError, match=f"texts of {CAPACITY + 1} tokens, whose sinks and window hold {CAPACITY}"):
            weights(model, ids, **options)
    cache = model(ids[:, :CAPACITY])[CACHE]
    with pytest.raises(ValueError, match="Leave output_attentions off"):
        weights(model, ids[:, CAPACITY:], **{CACHE: cache})
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [CAPACITY] * 3
    mask = torch.ones_like(ids)
    mask[:, 0] = 0  # as many real tokens as the window holds
    assert len(weights(model, ids, attention_mask=mask, position_ids=positions(mask))) == (attention == "eager") * 3


def test_asked_for_in_the_config():
    plain, _ = pair()
    plain.config.output_attentions = True
    model = copy.deepcopy(plain)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    retrofit(model, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    assert hooks == {n: len(m._forward_hooks) for n, m in restore(copy.deepcopy(model)).named_modules()}
    same(model(tokens(1, 6)).attentions, plain(tokens(1, 6)).attentions)
    with pytest.raises(ValueError, match="in the call and in the config"):
        model(tokens(1, 2 * CAPACITY))
    model.model.config.output_attentions = False
    assert plain.config.output_attentions and model(tokens(1, 2 * CAPACITY)).attentions is None


@pytest.mark.parametrize("first", ["before", "after", "hidden states only"])
def test_each_weight_is_collected_once_before_during_and_after(first):
    """Hooks of transformers are installed when somebody first asks, on the modules that are there."""
    plain, _ = pair()
    ids, expected = tokens(1, 6), weights(pair()[0], tokens(1, 6))
    if first == "before":
        weights(plain, ids)
    model = retrofitted(model=plain)
    if first == "hidden states only":
        with torch.no_grad(), full_attention(model):
            model(ids, output_hidden_states=True)
    if first != "after":
        same(weights(model, ids), expected)
        same(weights(model, ids), expected)
        with full_attention(model):
            same(weights(model, ids), expected)
    restore(model)
    same(weights(model, ids), expected)
    same(weights(retrofitted(model=model), ids), expected)


def test_generate_gives_the_base_models():
    plain, model = pair(window_size=40)
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "output_attentions": True, "return_dict_in_generate": True}
    for beams in (1, 3):
        ours, theirs = (generate(m, ids, 5, num_beams=beams, **options) for m in (model, plain))
        assert torch.equal(ours.sequences, theirs.sequences) and len(ours.attentions) == 5
        for one, other in zip(ours.attentions[1:], theirs.attentions[1:], strict=True):
            same(one, other)


def test_a_static_cache():
    _, model = pair()
    cache, ids = StaticCache(config=model.config, max_cache_len=20), tokens(2, 6)
    expected = weights(model, ids)
    model(ids[:, :5], **{CACHE: cache})
    for one, other in zip(weights(model, ids[:, 5:], **{CACHE: cache}), expected, strict=True):
        torch.testing.assert_close(one, other[:, :, 5:], rtol=0, atol=1e-6)
