"""A model class that nobody knows: what its attention does decides, and not what it is called."""

import pytest
import torch

from ahn_layers import GatedDeltaNet, retrofit

from ..families.checks import Case, judge
from .own_model import own_model

SLIDES = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
RIGHT = {
    "many traits": (("bias", "qk-norm", "parallel", "gate", "slices its mask"), {"kv_heads": 1, "head_dim": 6}),
    "softcap, neighbours turned": (("softcap", "interleaved"), {"attention": "eager"}),
    "keys repeated before": (("repeats keys", "no positions"), {}),
    "another attention beside": (("cross",), {}),
    "a window in some layers": (("tells its window",), SLIDES),
}
REFUSED = {
    "own function": ("does not use the attention interface", {}),
    "kept function": ("does not use the attention interface", {}),
    "slopes": ("computes something else than softmax attention", {"attention": "eager"}),
    "softmax one": ("computes something else than softmax attention", {"attention": "eager"}),
    "sigmoid": ("computes something else than softmax attention", {"attention": "eager"}),
    "bias mask": ("changes the mask", {}),
    "biased by the model": ("changes the mask", {"attention": "eager"}),
    "own window": ("changes the mask", {}),
    "turned after the cache": ("makes other keys of a token when earlier ones are in the cache", {}),
    "centred keys": ("makes other keys of a token when earlier ones are in the cache", {}),
    "scaling of the length": ("scales by the number of keys", {}),
    "learned scaling": ("scales its scores by a tensor, expected a number", {"attention": "eager"}),
    "prefix": ("attends to 5 keys when it reads 3 tokens", {}),
    "twice": ("calls the attention function 2 times", {}),
    "one layer again": ("calls the attention function 2 times", {}),
    "not causal": ("is_causal=False: expected causal attention", {}),
    "no layer_idx": ("has no layer_idx", {}),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", RIGHT)
def test_traits_that_a_memory_honours(name):
    traits, options = RIGHT[name]
    verdict = judge(Case(own_model(*traits, **options), torch.tensor([[5, 6]]), vocabulary=64))
    assert verdict.word == "passes", verdict.cause
    assert verdict.layers == ("1 of 2" if options is SLIDES else "2 of 4" if "cross" in traits else "2 of 2")
    assert options is SLIDES or not verdict.base


@pytest.mark.parametrize("name", REFUSED)
def test_traits_that_retrofit_refuses(name):
    message, options = REFUSED[name]
    model = own_model(name, **options)
    text = torch.randint(64, (1, 12))
    before = model(text, use_cache=False).logits
    with pytest.raises(ValueError, match=message):
        retrofit(model, GatedDeltaNet, window_size=4, num_sinks=1)
    assert torch.equal(model(text, use_cache=False).logits, before)
