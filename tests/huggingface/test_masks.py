"""Whose masks are whose: noted in the probe from what each module receives, not guessed from the config."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ahn_layers import GatedDeltaNet, retrofit

from ..models import (
    CAPACITY,
    INDEXED,
    SINKS,
    SIZES,
    WINDOW,
    base,
    generate,
    logits,
    positions,
    retrofitted,
    tokens,
    train_memory,
)

LONG = 5 * CAPACITY
SPARSE = {
    "num_local_experts": 2, "num_experts_per_tok": 1, "dense_intermediate_size": 16, "shared_intermediate_size": 16,
    "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
}  # fmt: skip
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
OTHERS = {
    "a kind of layer that is not known": ("minimax_m3_vl_text", SPARSE, [0, 2], "none"),
    "values that are viewed": (
        "afmoe",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "sliding_window": 64},
        [0, 1, 2],
        "local",
    ),
    "a decoder of an encoder-decoder, alone": ("bart", DECODER, [0, 1], "full+local"),
    "a window that only generate knows": ("moshi", {"sliding_window": 64}, [0, 1, 2], "full+local"),
}


def model_of(kind, options):
    config = AutoConfig.for_model(kind, **SIZES | options)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("case", OTHERS)
def test_models_with_masks_of_several_kinds(case):
    kind, options, layers, owned = OTHERS[case]
    model, short, long = model_of(kind, options), tokens(2, CAPACITY), tokens(2, LONG)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, :7] = 0
    expected = logits(model, short)
    retrofit(model, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    train_memory(model)
    assert (model.hippocampus.layers, model.hippocampus.owned) == (layers, owned)
    assert torch.equal(logits(model, short), expected)
    torch.testing.assert_close(logits(model, short, [3, 1, 4]), expected, rtol=0, atol=1e-5)
    for cuts in (1, 5, [CAPACITY, 2, LONG - CAPACITY - 2]):
        torch.testing.assert_close(logits(model, long, cuts), logits(model, long), rtol=0, atol=2e-4)
    options = {"attention_mask": mask}
    if "position_ids" in model.forward.__code__.co_varnames:
        options["position_ids"] = positions(mask)
        alone = logits(model, long[:1, 7:])
        torch.testing.assert_close(logits(model, long, **options)[:1, 7:], alone, rtol=0, atol=2e-4)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, long, **static), generate(model, long))
    padding = {"attention_mask": mask}
    assert torch.equal(generate(model, long, **static, **padding), generate(model, long, **padding))


def test_a_window_that_the_blocks_do_not_know_is_that_of_their_mask():
    """Reproduction 9 of silent faults: the static cache got a mask that was not ours."""
    model = retrofitted("phimoe")
    blocks = [module.found for module in model.modules() if hasattr(module, "found")]
    assert {(block.kind, block.native_window) for block in blocks} == {("sliding", 9)}
    assert not hasattr(blocks[0].module, "sliding_window") or blocks[0].module.sliding_window is None
    ids = tokens(2, LONG)
    static = generate(model, ids, 20, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, ids, 20))
    with pytest.raises(ValueError, match="its own sliding window of 9 is smaller"):
        retrofit(base("phimoe"), GatedDeltaNet, window_size=8, num_sinks=2)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_layers_that_choose_among_the_tokens_are_refused(kind):
    with pytest.raises(ValueError, match=r"is a .\w+_attention. layer, whose cache"):
        retrofit(model_of(kind, INDEXED), GatedDeltaNet, window_size=WINDOW)


class Keeping(torch.nn.Module):
    """A child of an attention block that is given the block's mask too."""

    def forward(self, x, mask):
        self.kept = mask
        return x


def test_a_mask_that_goes_elsewhere_too_is_not_ours():
    model, keeping = base(), Keeping()
    block = model.model.layers[1].self_attn
    block.add_module("keeping", keeping)

    def look(module, args, kwargs):
        keeping(kwargs["hidden_states"], kwargs["attention_mask"])

    block.register_forward_pre_hook(look, with_kwargs=True)
    expected = logits(retrofitted(), tokens(2, LONG))
    retrofitted(model=model)
    assert model.hippocampus.owned == "local" and model.hippocampus.layers == [0, 1, 2]
    torch.testing.assert_close(logits(model, tokens(2, LONG)), expected, rtol=0, atol=1e-9)


def test_a_block_that_changes_its_mask_is_refused():
    model = base()

    def change(module, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] & True}

    model.model.layers[1].self_attn.register_forward_pre_hook(change, with_kwargs=True)
    retrofitted(model=model)
    assert model.hippocampus.layers == [0, 2] and model.hippocampus.owned == "none"
    assert "changes the mask" in model.hippocampus.skipped["model.layers.1.self_attn"]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "mask, held",
    [
        (torch.tensor([[float("-inf")] * 3 + [0.0] * 9]), "-inf, -inf"),
        (torch.tensor([[1] * 5 + [2] * 4 + [3] * 3]), "2, 2, 2"),
        (torch.tensor([[1.0] * 11 + [0.5]]), "0.5"),
    ],
    ids=["added to scores", "numbers of packed texts", "shares"],
)
def test_masks_hold_ones_and_zeros(mask, held, cached):
    """Transformers takes everything but 0 for a token."""
    with pytest.raises(ValueError, match=rf"attention_mask holds \[{held}.*among others"):
        retrofitted()(tokens(1, 12), attention_mask=mask, use_cache=cached)
