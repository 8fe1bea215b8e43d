"""Caches that were filled under ``torch.inference_mode`` and go on outside of it, where gradients are recorded."""

import pytest
import torch

from ahn_layers import GatedDeltaNet, HippocampalCache, SalientSlots
from ahn_layers.huggingface.decoder import CACHE

from ..models import positions, retrofitted, tokens
from .caching import close

KINDS = {"memory": (GatedDeltaNet, None), "slots": (GatedDeltaNet, 4), "slots alone": (None, 4)}


@pytest.fixture(params=KINDS)
def model(request):
    compressor, slots = KINDS[request.param]
    eviction = None if slots is None else SalientSlots(slots, score="key_difference")
    return retrofitted(compressor=compressor, eviction=eviction)


def expected(model, ids, mask=None):
    options = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize("before", ["outside", "inside"])
def test_in_and_out_again(model, before):
    """In between, some of the cache's tensors are written to and others are new."""
    ids, cache = tokens(2, 40), HippocampalCache()
    with torch.inference_mode(before == "inside"):
        outs = [model(ids[:, :20], **{CACHE: cache}).logits]
    with torch.no_grad():
        outs.append(model(ids[:, 20:22], **{CACHE: cache}).logits)
    with torch.inference_mode():
        outs.append(model(ids[:, 22:23], **{CACHE: cache}).logits)
    outs += [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in ((23, 24), (24, 40))]
    close(torch.cat(outs, dim=1), expected(model, ids))


def test_tokens_are_taken_back(model):
    ids, cache = tokens(2, 40), HippocampalCache()
    cache.activate_past_recording()
    with torch.inference_mode():
        for piece in ids[:, :26].split((20, 3, 3), dim=1):
            model(piece, **{CACHE: cache})
    cache.crop(-4)
    close(model(ids[:, 22:], **{CACHE: cache}).logits, expected(model, ids)[:, 22:])


def test_tokens_are_hidden(model):
    ids, cache = tokens(2, 20), HippocampalCache()
    mask = torch.ones_like(ids)
    mask[0, 4:7] = 0  # what generate pads a finished row with
    with torch.inference_mode():
        model(ids[:, :7], **{CACHE: cache})
    out = model(ids[:, 7:], attention_mask=mask, position_ids=positions(mask)[:, 7:], **{CACHE: cache}).logits
    close(out, expected(model, ids, mask)[:, 7:])
