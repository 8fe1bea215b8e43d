"""Calls and caches that a retrofitted model refuses: each error names a remedy, and nothing has changed."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from ahn_layers import HippocampalCache, Mamba2, full_attention, window_only
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.decoder import CACHE

from .models import base, generate, retrofitted, tokens
from .refusing import LONG, refused

pytestmark = pytest.mark.usefixtures("unchecked")


def filled(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, cache=cache, use_cache=True).past_key_values


def held(cache):
    """Every tensor of a cache, copied."""
    found = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, MemoryLayer):
            held = {} if layer.state is None else layer.state.tensors()
            found |= {f"{i}.{name}": u.clone() for name, u in held.items()} | {f"{i}.length": layer.get_seq_length()}
        elif layer.is_initialized:
            found |= {f"{i}.keys": layer.keys.clone(), f"{i}.values": layer.values.clone()}
    return found


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(u, other[name]) if isinstance(u, torch.Tensor) else u == other[name] for name, u in one.items()
    )


def passing(**options):
    """Pass these to the call."""
    return lambda model, ids, cache: model(ids, cache=cache, **options)


def in_training(model, ids, cache):
    model.train()
    try:
        for attention in (layer.self_attn for layer in model.model.layers):
            attention.block.attention_dropout = 0.25
        model(ids, cache=cache)
    finally:
        for attention in (layer.self_attn for layer in model.model.layers):
            attention.block.attention_dropout = 0.0
        model.eval()


def inside(switch):
    def call(model, ids, cache):
        with switch(model):
            model(ids, cache=cache)

    return call


def restored(model, ids, cache):
    base()(ids, **{CACHE: cache})


def hiding(new, column):
    """A mask that says that a token of the second row was padding, long after it has been folded."""
    mask = torch.ones(2, LONG + new.shape[1], dtype=torch.long)
    mask[1, column] = 0
    return mask


def attend(model, cache, length, **options):
    """Call the first attention block alone: the models themselves stumble over some arguments before."""
    x, ones = torch.randn(2, length, 32, dtype=torch.float64), torch.ones(1, length, 8, dtype=torch.float64)
    arguments = {"position_embeddings": (ones, 0 * ones), "attention_mask": None, CACHE: cache}
    return model.model.layers[0].self_attn(x, **arguments | options)


DROP = ("attention dropout=0.25: expected 0", "config.attention_dropout = 0 or call model.eval()")
MODEL_CALLS = {
    "dropout": (in_training, *DROP),
    "a 4-D mask": (
        passing(attention_mask=torch.zeros(2, 1, 3, LONG + 3)), f"attention_mask has shape (2, 1, 3, {LONG + 3})",
        "causality, padding and images", "2-D mask",
    ),
    "a 4-D mask of bool": (
        passing(attention_mask=torch.ones(2, 1, 1, LONG + 3).bool()), "attention_mask has shape", "Pass a 2-D mask",
    ),
    "output_attentions": (passing(output_attentions=True), "output_attentions", "Leave output_attentions off"),
    "packed": (passing(cu_seq_lens_q=torch.tensor([0, 2])), "cu_seq_lens=[0, 2] for 2 rows", "expected one row"),
    "seq_idx": (passing(seq_idx=torch.arange(4)[None]), "seq_idx has shape (1, 4)", "expected (2, "),
    "a mask that is too short": (
        passing(attention_mask=torch.ones(2, LONG).long()), f"attention_mask has shape (2, {LONG})",
        f"the {LONG} tokens in the cache",
    ),
    "a mask over folded tokens": (
        lambda m, ids, cache: m(ids, cache=cache, attention_mask=hiding(ids, column=9)), "hides tokens of rows [1]",
        "cannot be undone", "clone",
    ),
    "a bias": (passing(position_bias=torch.zeros(1)), "position_bias", "not supported"),
    "both directions": (
        lambda m, ids, cache: attend(m, cache, ids.shape[1], is_causal=False), "is_causal=False", "expected causal",
    ),
    "fewer rows": (lambda m, ids, cache: m(ids[:1], cache=cache), "2 rows", "have 1", "state.reorder(index)"),
    "without its memory": (inside(window_only), "made with the long-term memory", "continued without", "Keep to one"),
    "full attention": (inside(full_attention), "filled by the bounded memory", "Begin a new cache"),
    "the base model": (restored, "filled by the bounded memory", "Begin a new cache", "after restore"),
    "another window": (
        lambda m, ids, cache: retrofitted(window_size=7)(ids, cache=cache), "window_size=6", "window_size=7",
        "same window",
    ),
    "another compressor": (
        lambda m, ids, cache: retrofitted(compressor=Mamba2)(ids, cache=cache),
        "filled with other memory weights", "another compressor",
        "begin a new cache",
    ),
    "another dtype": (
        lambda m, ids, cache: retrofitted(dtype=torch.float32)(ids, cache=cache), "float64 on cpu",
        "k is torch.float32", "computed anew",
    ),
    "another model": (
        lambda m, ids, cache: retrofitted(model=base(num_key_value_heads=4))(ids, cache=cache),
        "k with 2 heads of 8, the tokens have 4 heads of 8", "another layer or model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("case", MODEL_CALLS)
def test_calls_that_a_model_refuses(case, length):
    """In a text far beyond the window: the cache is bit for bit what it was, and goes on."""
    provoke, *parts = MODEL_CALLS[case]
    model, ids = retrofitted(), tokens(2, LONG + 3)
    new = ids[:, LONG : LONG + length]
    cache = filled(model, ids[:, :LONG])
    before = held(cache)
    with torch.no_grad(), refused(ValueError, *parts):
        provoke(model, new, cache)
    assert equal(held(cache), before)
    with torch.no_grad():
        out = model(new, cache=cache).logits
        expected = model(new, cache=filled(model, ids[:, :LONG])).logits
    assert torch.equal(out, expected)


def offloaded():
    cache = DynamicCache()
    cache.offloading = True
    return cache


CACHES = {
    "quantised": (lambda: QuantizedCache.__new__(QuantizedCache), "of type QuantizedCache", "Leave cache_impl"),
    "of an encoder-decoder": (
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "of type EncoderDecoderCache", "'static'",
    ),
    "offloaded": (offloaded, "cannot use a cache that is offloaded", "Leave cache_implementation unset"),
    "of full attention": (
        lambda: filled(base(), tokens(2, 7)), "layer 0 of this cache holds 7 tokens", "Begin with an empty cache",
    ),
    "static, of full attention": (
        lambda: filled(base(), tokens(2, 7), StaticCache(config=base().config, max_cache_len=32)),
        "layer 0 of this cache holds 7 tokens", "Begin with an empty cache",
    ),
    "filled inside full_attention": (
        lambda: filled_inside(full_attention), "holds 7 tokens of full attention", "Begin with an empty cache",
    ),
    "filled inside window_only": (lambda: filled_inside(window_only), "made without the long-term", "Keep to one mode"),
    "of a model without memory": (
        lambda: filled(retrofitted(compressor=None), tokens(2, 7)), "made without the long-term", "state=None",
    ),
}  # fmt: skip


def filled_inside(switch):
    model = retrofitted()
    with switch(model):
        return filled(model, tokens(2, 7))


@pytest.mark.parametrize("case", CACHES)
def test_caches_that_a_model_refuses(case):
    make, *parts = CACHES[case]
    model, cache = retrofitted(), make()
    before = held(cache) if "holds" in parts[0] or "made" in parts[0] else None
    for length in (1, 3):
        with torch.no_grad(), refused(ValueError, *parts):
            attend(model, cache, length)
    if before is not None:
        assert equal(held(cache), before)
        with torch.no_grad(), refused(ValueError, *parts):
            model(tokens(2, 1), cache=cache)
        assert equal(held(cache), before)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="transformers asks for a CUDA stream"
)
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_generate_with_an_offloaded_cache_is_refused(kind):
    with refused(ValueError, "cannot use a cache that is offloaded", "Leave cache_implementation unset"):
        generate(retrofitted(), tokens(1, LONG), cache_implementation=kind)


def test_a_cache_on_another_device_is_refused():
    model, ids = retrofitted(), tokens(1, LONG)
    cache = HippocampalCache.of(filled(model, ids)).clone("meta")
    with (
        torch.no_grad(),
        refused(ValueError, "float64 on meta, k is torch.float64 on cpu", "cache.clone(device)"),
    ):
        model(ids[:, :1], cache=cache)


def test_tokens_that_were_folded_cannot_be_taken_back():
    model, ids = retrofitted(), tokens(2, LONG + 1)
    cache = filled(model, ids[:, :LONG])
    before = held(cache)
    with refused(RuntimeError, "crop(-3): 0 tokens are recorded", "activate_past_recording()", "clone"):
        cache.crop(-3)
    assert equal(held(cache), before)
    static = StaticCache(config=model.config, max_cache_len=64)
    filled(model, ids[:, :LONG], static)
    with refused(RuntimeError, "crop(-1): a static memory cannot be cropped", "dynamic cache"):
        static.layers[0].crop(-1)


def test_a_beam_that_is_not_there():
    cache = filled(retrofitted(), tokens(2, LONG))
    before = held(cache)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 2]))
    assert equal(held(cache), before)
