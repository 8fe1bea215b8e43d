"""A retrofit changes one model object: not the configs that others share, nor models that are made from them."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ahn_layers import full_attention, restore

from ..models import CAPACITY, base, logits, positions, tokens
from .isolated import LONG, built, everything, put, same, shared

FAMILIES = ["llama", "mistral_window", "gemma3", "phimoe", "vlm"]


@pytest.mark.parametrize(
    "name, attention", [*((name, "sdpa") for name in FAMILIES), ("llama", "eager"), ("vlm", "eager")]
)
def test_models_that_share_a_config_do_not_notice(name, attention):
    """Reproduction 2 of silent faults: the other model lost its causal mask."""
    first, second, third = shared(name, attention, 3)
    before, facts = everything(second), copy.deepcopy(vars(first.config))
    put(first)
    assert vars(first.config) == facts and type(first.config) is type(second.config)
    same(everything(second), before)
    ours = everything(first)
    put(third)  # retrofitted as well, in another way
    same(everything(first), ours)
    same(everything(second), before)
    put(second)
    with full_attention(second):
        same(everything(second), before)
    same(everything(first), ours)
    restore(first)
    assert not any("ConfigView" in str(type(m.config).__mro__) for m in first.modules() if hasattr(m, "config"))
    restore(second)
    same(everything(second), before)


@pytest.mark.parametrize(
    "how, attention",
    [
        *((how, "sdpa") for how in ("config", "view", "from_config", "copied view", "loaded", "loaded with view")),
        *((how, "eager") for how in ("view", "loaded")),
    ],
)
def test_models_made_from_a_retrofitted_ones_config_are_plain(how, attention, tmp_path):
    plain, model = base(dtype=torch.float32), base(dtype=torch.float32)  # in which eager masks rows of pads are finite
    for one in (plain, model):
        one.set_attn_implementation(attention)
    expected, ours = everything(plain), everything(put(model))
    made = built(model, how, tmp_path)
    assert model.config._attn_implementation == attention
    same(everything(made), expected)
    same(everything(model), ours)
    put(made)
    same(everything(made), ours)
    restore(made)
    same(everything(made), expected)
    same(everything(model), ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_says_nothing_of_the_retrofit(name, tmp_path):
    (model,) = shared(name, "sdpa", 1)
    before = model.config.to_dict(), model.config.to_diff_dict(), repr(model.config)
    put(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and config.model_type == model.config.model_type:
            assert (config.to_dict(), config.to_diff_dict(), repr(config)) == before
            assert config == model.config and model.config == config
            assert isinstance(config, type(model.config)) and type(config).__name__ == type(model.config).__name__
            config.save_pretrained(tmp_path)
            assert "hippocampal" not in (tmp_path / "config.json").read_text()
            assert type(config.from_pretrained(tmp_path)) is type(model.config)
            assert type(type(config)(**config.to_dict())) is type(model.config)


def test_what_is_set_in_a_config_holds_for_its_views_and_back():
    model = put(base())
    view = model.model.config
    model.config.use_cache, view.new = False, 3
    assert view.use_cache is False and model.config.new == 3
    assert model(tokens(1, 4)).past_key_values is None
    view._attn_implementation = view._attn_implementation
    assert model.config._attn_implementation == "sdpa"
    model.model.config.update({"use_cache": True})
    assert model.config.use_cache is True


@pytest.mark.parametrize("name", ["llama", "gemma3", "vlm"])
def test_another_attention_implementation_after_the_retrofit(name):
    (model,), (fresh,) = shared(name, "sdpa", 1), shared(name, "eager", 1)
    put(model)
    sdpa = logits(model, tokens(1, LONG))
    model.set_attn_implementation("eager")
    assert model.config.get_text_config()._attn_implementation == "eager"
    short = tokens(2, CAPACITY)
    expected = logits(put(fresh), short)
    assert torch.equal(logits(model, short), expected)
    torch.testing.assert_close(logits(model, tokens(1, LONG)), sdpa)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, tokens(1, LONG)), sdpa)
    restore(model)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_an_implementation_without_a_memory_is_an_error_when_it_runs():
    model = put(base())
    expected = logits(model, tokens(1, LONG))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        ValueError, match=r"'flex_attention' was set after the retrofit.*set_attn_implementation\('sdpa'"
    ):
        model(tokens(1, LONG))
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, tokens(1, LONG)), expected)


# --- whose mask it is


def test_blocks_called_without_their_model_get_the_native_mask():
    """``forward`` itself, which calls no hooks."""
    model, ids = put(base()), tokens(2, LONG)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        direct = model.model.forward(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        usual = model.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    torch.testing.assert_close(direct.last_hidden_state[:, 7:], usual.last_hidden_state[:, 7:], rtol=0, atol=1e-12)


def test_a_bare_decoder():
    """The outermost module makes the masks: its own config is a view."""
    plain, model = base().model, base().model
    expected = plain(tokens(2, LONG)).last_hidden_state
    put(model)
    made = type(model)(model.config)
    made.load_state_dict(plain.state_dict())
    assert torch.equal(made.double().eval()(tokens(2, LONG)).last_hidden_state, expected)
    with full_attention(model):
        assert torch.equal(model(tokens(2, LONG)).last_hidden_state, expected)
    assert not torch.equal(model(tokens(2, LONG)).last_hidden_state, expected)
    restore(model)
    assert torch.equal(model(tokens(2, LONG)).last_hidden_state, expected)
    assert type(model.config) is LlamaConfig and isinstance(base(), LlamaForCausalLM)
