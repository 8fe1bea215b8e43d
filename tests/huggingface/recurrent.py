"""Caches of models with convolutions and recurrences: filled, continued, compared."""

import torch

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.layer_values import tensors_of

from ..models import CACHE, tokens


def read(model, length, seed=0, *, recording=False):
    """A cache that has read a text of so many tokens."""
    cache = HippocampalCache()
    if recording:
        cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(1, length, seed=seed), use_cache=True, **{CACHE: cache})
    return cache


def go_on(model, cache, ids):
    """Logits of new tokens one by one, each row at the position at which it would go on alone."""
    lengths = torch.tensor([[int(cache.take(row).get_seq_length())] for row in range(len(ids))])
    outs = []
    with torch.no_grad():
        for t, token in enumerate(ids.split(1, dim=1)):
            outs.append(model(token, position_ids=lengths + t, use_cache=True, **{CACHE: cache}).logits)
    return torch.cat(outs, dim=1)


def held(cache):
    """Every tensor of a cache, in a form that compares."""
    return {
        (i, name): (u.dtype, u.tolist())
        for i, layer in enumerate(cache.layers)
        for name, u in tensors_of(layer).items()
    }


def caught(act, error):
    """Whether this raises such an error."""
    try:
        act()
    except error:
        return True
    return False
