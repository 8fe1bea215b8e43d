"""Prompts that cannot be cut, caches that a model fills by itself, and arguments that only the loss reads."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.huggingface.rotations import longest_fixed_rotation

from ..models import SIZES, base, retrofitted, tokens

pytestmark = pytest.mark.usefixtures("unchecked")
ORIGINAL = 40
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "long_factor": [4.0, 3.0, 2.0, 5.0],
    "short_factor": [1.0, 1.5, 1.0, 1.2], "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
ROTATIONS = {
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 160},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        "max_position_embeddings": ORIGINAL,
    },
}


def rotated(kind, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(SIZES | ROTATIONS[kind]), initializer_range=0.2))
    return retrofitted(model=model.double().eval(), sink_positions="absolute", **options)


@pytest.mark.parametrize("window_size", [6, 90])
@pytest.mark.parametrize("length", [ORIGINAL - 5, ORIGINAL, ORIGINAL + 1, 70])
@pytest.mark.parametrize("cache", ["made by generate", "own", "static"])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_that_depend_on_the_length_are_those_of_one_pass(kind, cache, length, window_size, monkeypatch):
    """Whatever the size of the pieces in which prompts are read by default."""
    monkeypatch.setattr("ahn_layers.huggingface.prefill.PREFILL_CHUNK", 16)
    monkeypatch.setattr("ahn_layers.huggingface.prefill.SHORTEST_CHUNK", 16)
    model, ids = rotated(kind, window_size=window_size), tokens(1, length)
    kept = {"own": {CACHE: HippocampalCache()}, "static": {CACHE: StaticCache(model.config, 96)}}.get(cache, {})
    out = model.generate(
        ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, **kept
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(out.logits[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_size_of_pieces_that_would_change_the_rotation_is_an_error(kind):
    model = rotated(kind)
    assert longest_fixed_rotation(model) == ORIGINAL and longest_fixed_rotation(base()) is None
    with pytest.raises(ValueError, match=f"prefill_chunk_size=16: this model rotates texts of more than {ORIGINAL}"):
        model.generate(tokens(1, 70), max_new_tokens=1, prefill_chunk_size=16)
    short = {"max_new_tokens": 1, "do_sample": False}
    for options in ({"prefill_chunk_size": 16}, {"prefill_chunk_size": 70}):
        ids = tokens(1, ORIGINAL - 5 if options["prefill_chunk_size"] == 16 else 70)
        assert torch.equal(model.generate(ids, **short, **options), model.generate(ids, use_cache=False, **short))


def test_the_cache_of_a_hybrid_is_filled_with_its_kinds_of_layers():
    """Without ``config=``: the layers that are not attention get theirs too."""
    model, ids = retrofitted("lfm2"), tokens(1, 30)
    cache, steps = HippocampalCache(), []
    with torch.no_grad():
        for piece in ids.split(7, dim=1):
            steps.append(model(piece, **{CACHE: cache}).logits)
        assert torch.allclose(torch.cat(steps, dim=1), model(ids, use_cache=False).logits, rtol=0, atol=1e-9)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, **{CACHE: HippocampalCache()})
    assert torch.equal(out, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("length", [5, 30])
def test_an_assistant_that_leaves_early(length):
    """The first layers of the model draft, all of them check."""
    model, ids = retrofitted(), tokens(1, length)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, assistant_early_exit=1)
    assert torch.equal(out, model.generate(ids, max_new_tokens=8, do_sample=False))
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [5, 30])
def test_arguments_of_the_loss_reach_the_loss(length, attention):
    model, plain = (make() for make in (retrofitted, base))
    for one in (model, plain):
        one.set_attn_implementation(attention)
    ids = tokens(2, length)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = [model(ids, labels=ids, shift_labels=shifted).loss, model(ids, labels=ids).loss]
    assert torch.allclose(*losses)
    if length == 5:
        assert torch.allclose(losses[0], plain(ids, labels=ids, shift_labels=shifted).loss)
    weights = {"num_items_in_batch": torch.tensor(7)}
    assert torch.isfinite(model(ids, labels=ids, **weights).loss)
