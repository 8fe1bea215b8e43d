"""Caches that were filled, and what they hold."""

import pytest
import torch

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.layer_values import tensors_of

from ..models import CAPACITY, logits, retrofitted, tokens

LONG = 3 * CAPACITY + 1
LENGTHS = {"in the sinks": 1, "brim": CAPACITY, "beyond": LONG}
every_length = pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)


@pytest.fixture(autouse=True)
def fast(unchecked):
    """Shapes are not checked: there are many calls of small models."""


@pytest.fixture(scope="module")
def model():
    return retrofitted()


def read(model, ids, cache=None, **options):
    """A cache that has read a text in one go."""
    cache = HippocampalCache() if cache is None else cache
    logits(model, ids, ids.shape[1], cache, **options)
    return cache


def go_on(model, cache, count=CAPACITY + 3, rows=None, seed=77):
    """The logits of a continuation, token by token: in place, once the window is full."""
    rows = cache.layers[0].batch_size if rows is None else rows
    return logits(model, tokens(rows, count, seed=seed), 1, cache)


def tensors(cache):
    """Every tensor of a cache by name, copied."""
    own = {i: tensors_of(layer) for i, layer in enumerate(cache.layers)}
    return {(i, name): u.clone() for i, layer in own.items() for name, u in layer.items()}


def same(cache, before):
    now = tensors(cache)
    return now.keys() == before.keys() and all(torch.equal(u, before[name]) for name, u in now.items())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
