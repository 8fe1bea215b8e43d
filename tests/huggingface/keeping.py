"""Conversations on a kept cache, by a model that decodes as on a GPU and by one that does not."""

# ruff: noqa: F811 - fixtures are imported

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.layer_values import describe, tensors_of

from ..models import generate, retrofitted, tokens
from .recorded import ENOUGH, Replay, recorded  # noqa: F401 - a fixture

WIDE = 60
"""A window that does not fill up."""


@pytest.fixture
def pair(recorded):
    """A model that decodes as on a GPU, and the same model as it decodes elsewhere."""
    return lambda **options: (recorded(retrofitted(**options)), retrofitted(**options))


def ones(ids):
    return {"attention_mask": torch.ones_like(ids)}


def chat(model, cache, *, first=20, rows=1, turns=3, new=10, **options):
    """A conversation; after each turn what was said and a copy of the cache."""
    ids = tokens(rows, first)
    for turn in range(turns):
        torch.manual_seed(turn)
        ids = generate(model, ids, new, cache=cache, **ones(ids), **options)
        yield ids, cache.clone()
        ids = torch.cat((ids, tokens(rows, 4, seed=turn + 5)), dim=1)


def same(cache, other):
    assert len(cache.layers) == len(other.layers) > 0
    for mine, its in zip(cache.layers, other.layers, strict=True):
        assert type(mine) is type(its) is MemoryLayer and describe(mine) == describe(its)
        a, b = tensors_of(mine), tensors_of(its)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return True


class Look(BaseStreamer):
    """Does something with every token; notes how often."""

    def __init__(self, look, after=1):
        self.look, self.after, self.count = look, after, 0

    def put(self, value):
        """The prompt comes first."""
        self.count += 1
        if self.count > self.after:
            self.look()

    def end(self):
        """Nothing."""
