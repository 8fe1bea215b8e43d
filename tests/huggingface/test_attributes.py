"""Attributes that are set on a retrofitted block are those of the block, as they were before."""

import copy

import torch

from ahn_layers import restore

from ..models import CAPACITY, base, logits, retrofitted, tokens
from .caching import close


def scaled(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    return model


def test_a_factor_that_is_set_afterwards_counts():
    short, plain = tokens(1, CAPACITY), base()
    model, other = retrofitted(), retrofitted()
    expected = logits(scaled(plain), short)
    assert not torch.equal(logits(model, short), expected)
    assert torch.equal(logits(scaled(model), short), expected)
    assert torch.equal(logits(copy.deepcopy(model), short), expected)
    assert torch.equal(logits(scaled(copy.deepcopy(other)), short), expected)
    assert torch.equal(logits(other, short), logits(base(), short)), "the model that was copied has changed"
    restore(model)
    assert torch.equal(logits(model, short), expected)


def test_layers_are_taken_out_and_numbered_anew():
    model, ids = retrofitted(), tokens(2, 5 * CAPACITY)
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    close(logits(model, ids, 7), logits(model, ids))
