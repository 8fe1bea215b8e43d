"""Models that share a config or are made from one another, and all that they compute."""

import copy

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, StaticCache

from ahn_layers import GatedDeltaNet, retrofit
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, NARROW, SINKS, SIZES, WINDOW, base, generate, logits, positions, tokens, train_memory

LONG = 5 * CAPACITY


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
