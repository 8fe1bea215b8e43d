"""A retrofit changes one model object: not the configs that others share, nor models that are made from them."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from ahn_layers import GatedDeltaNet, full_attention, restore, retrofit
from ahn_layers.huggingface.decoder import CACHE

from ..models import (
    CAPACITY,
    NARROW,
    SINKS,
    SIZES,
    WINDOW,
    base,
    generate,
    logits,
    positions,
    tokens,
    train_memory,
)

LONG = 5 * CAPACITY
FAMILIES = ["llama", "mistral_window", "gemma3", "phimoe", "vlm"]


def shared(name, attention, count=2):
    """Models with weights of their own that share one config object."""
    torch.manual_seed(0)
    kwargs = {"attn_implementation": attention, "experts_implementation": "eager"}
    if name == "vlm":
        text = {**SIZES, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "head_dim": 8}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Gemma3Config(
            text_config={**text, "sliding_window": NARROW},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            image_token_index=3,
            boi_token_index=4,
            eoi_token_index=5,
            mm_tokens_per_image=4,
            **{"attn_implementation": attention},
        )
        models = [Gemma3ForConditionalGeneration(config) for _ in range(count)]
    else:
        config = base(name).config
        config._attn_implementation = attention
        models = [AutoModelForCausalLM.from_config(config, **kwargs) for _ in range(count)]
        models = [type(models[0])(config) for _ in models]
    assert all(model.config is config for model in models)
    for model in models:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return [model.eval() for model in models]


@torch.no_grad()
def everything(model):
    """Logits of a model on all paths on which masks are made."""
    ids, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :7] = 0
    padding = {"attention_mask": mask, "position_ids": positions(mask)}
    text = model.config.get_text_config()
    static = StaticCache(config=text, max_cache_len=LONG)
    static_pieces = [model(input_ids=u, **{CACHE: static}).logits for u in ids.split([21, LONG - 21], dim=1)]
    options = {"cache_implementation": "static", "disable_compile": True, "attention_mask": mask}
    return {
        "one pass": logits(model, ids),
        "padded": logits(model, ids, **padding)[:, 7:],
        "pieces": logits(model, ids, [21, 1, 18], cache=DynamicCache(config=text)),
        "static": torch.cat(static_pieces, dim=1),
        "generate": generate(model, ids, attention_mask=mask),
        "generate, static": generate(model, ids, **options),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, u in found.items():
        assert torch.equal(u, expected[name]), name


def put(model, **options):
    retrofit(model, GatedDeltaNet, **{"window_size": WINDOW, "num_sinks": SINKS} | options)
    train_memory(model)
    return model


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


def built(model, how, folder):
    """A plain model made from a retrofitted one."""
    inner = model.get_submodule("model").config  # a view
    weights = {name: u for name, u in model.state_dict().items() if ".memory." not in name}
    if how == "config":
        made = type(model)(model.config)
    elif how == "view":
        made = type(model)(inner)
    elif how == "from_config":
        made = AutoModelForCausalLM.from_config(inner)
    elif how == "copied view":
        made = type(model)(copy.deepcopy(inner))
    else:
        made = type(model)(model.config)
        made.load_state_dict(weights)
        made.to(model.dtype).save_pretrained(folder)
        made = type(model).from_pretrained(folder, config=model.config if how == "loaded" else inner, dtype=model.dtype)
    made.load_state_dict(weights)
    return made.to(model.dtype).eval()


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


# --- copies


def copies(model):
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", ["llama", "gemma3", "vlm"])
def test_copies_have_views_and_records_of_their_own(name):
    model, plain = shared(name, "sdpa", 2)
    plain.load_state_dict(model.state_dict())
    before, ours = everything(plain), everything(put(model))
    for how, copied in copies(model):
        same(everything(copied), ours)
        assert copied.hippocampus is not model.hippocampus, how
        with full_attention(copied):
            same(everything(copied), before)
            same(everything(model), ours)
        copied.config.get_text_config()._attn_implementation = "eager"
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        copied.config.get_text_config()._attn_implementation = "sdpa"
        restore(copied)
        same(everything(copied), before)
        same(everything(put(copied)), ours)
    same(everything(model), ours)


def test_a_part_of_a_model_can_be_copied():
    model = put(base())
    layer = copy.deepcopy(model.model.layers[1])
    x, places = torch.randn(1, LONG, 32, dtype=torch.float64), torch.arange(LONG)[None]
    rotation = model.model.rotary_emb(x, places)
    expected = model.model.layers[1](x, position_embeddings=rotation)
    assert torch.equal(layer(x, position_embeddings=rotation), expected)


def test_a_pickled_model_runs_in_a_new_process(tmp_path):
    model = put(base())
    torch.save((model, logits(model, tokens(1, LONG)), logits(base(), tokens(1, LONG))), tmp_path / "model.pt")
    code = (
        "import sys, torch; from ahn_layers import restore;"
        f"model, ours, plain = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        f"ids = torch.randint(1, 64, (1, {LONG}), generator=torch.Generator().manual_seed(0));"
        "assert torch.equal(model(ids, use_cache=False).logits, ours);"
        "assert torch.equal(restore(model)(ids, use_cache=False).logits, plain)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- threads and interruptions


def test_a_model_that_runs_meanwhile_does_not_notice():
    running, other = shared("llama", "eager", 2)
    ids, stop, wrong, count = tokens(1, 12), threading.Event(), [], [0]
    expected = logits(running, ids)

    def loop():
        while not stop.is_set():
            count[0] += 1
            if not torch.equal(logits(running, ids), expected):
                wrong.append(count[0])

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for _ in range(5):
            put(other)
            logits(other, ids)
            restore(other)
    finally:
        stop.set()
        thread.join()
    assert count[0] > 0 and not wrong


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_call_that_failed_other_models_are_still_plain(error):
    plain, model = base(), put(base())
    made = built(model, "view", None)

    def fail(*_):
        raise error("between two layers")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        model(tokens(1, LONG))
    handle.remove()
    expected = everything(plain)
    if error is ValueError:
        same(everything(made), expected)
    ours = everything(model)
    same(everything(made), expected)
    same(everything(model), ours)


def test_a_model_that_was_interrupted_while_it_was_probed_is_as_it_was():
    model = base()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = logits(model, tokens(1, LONG))

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        retrofit(model, GatedDeltaNet, window_size=WINDOW)
    handle.remove()
    for name, module in model.named_modules():
        assert vars(module) == before[name], name
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
