"""Decoding as one CUDA graph: the same tokens as eager decoding with a static cache. Needs a GPU."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from transformers import StaticCache

from .graphs import models  # noqa: F401 - a fixture: the library without checks of shapes, which cannot be traced

pytestmark = pytest.mark.gpu
NEW, STATIC = 24, {"cache_implementation": "static"}


@pytest.fixture
def recorded(models, monkeypatch):  # noqa: F811
    """The recordings that are replayed, one entry for each replay."""
    cls, replays = importlib.import_module("ahn_layers.huggingface.compiled.step_graph").Recording, []
    call = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, leaves: (replays.append(id(self)), call(self, leaves))[1])
    return replays


@pytest.fixture
def model(models):  # noqa: F811
    return models.retrofitted("qwen3", torch.float32).cuda()


def tokens(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def generate(model, ids, count, **options):
    return model.generate(ids, **{"max_new_tokens": count, "do_sample": False} | options)


def eager(model, ids, count=NEW, **options):
    return generate(model, ids, count, disable_compile=True, **STATIC | options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 4}], ids=str)
def test_replays_are_eager_steps(options, model, recorded):
    padded = tokens(2, 12, seed=2)
    padded[1, :9] = 0
    for ids in (tokens(2, 3), tokens(2, 3, seed=1), tokens(2, 40), padded):
        mask = {"attention_mask": (ids != 0).long()}
        recorded.clear()
        torch.manual_seed(0)
        found = generate(model, ids, NEW, **STATIC, **mask, **options)
        if "num_beams" not in options:  # which transformers never compiles
            assert len(recorded) >= NEW - 3 and len(set(recorded)) == 1
        torch.manual_seed(0)
        assert torch.equal(found, eager(model, ids, **mask, **options))


def test_a_thousand_tokens(model, recorded):
    ids = tokens(1, 5)
    generate(model, ids, 4, **STATIC)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = generate(model, ids, 1000, **STATIC)
    assert len(recorded) > 990
    with torch.no_grad():  # rounding may decide between two tokens that are as likely, and what follows is another text
        logits = model(found[:, :-1]).logits[:, ids.shape[1] - 1 :]
    chosen = logits.gather(2, found[:, ids.shape[1] :, None]).squeeze(2)
    torch.testing.assert_close(chosen, logits.amax(dim=2), rtol=1e-3, atol=1e-3)


def test_two_caches_in_turn(model):
    texts = [tokens(2, 5), tokens(2, 9, seed=3)]
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in texts]
    for _ in range(3):
        for i, cache in enumerate(caches):
            found = generate(model, texts[i], 7, cache=cache)
            assert torch.equal(found, eager(model, texts[i], 7))
            texts[i] = found


def test_the_mode_and_the_weights_of_the_moment_count(model):
    ids = tokens(2, 20)
    before = generate(model, ids, NEW, **STATIC)
    with sys.modules["ahn_layers"].window_only(model):
        found = generate(model, ids, NEW, **STATIC)
        assert torch.equal(found, eager(model, ids)) and not torch.equal(found, before)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    found = generate(model, ids, NEW, **STATIC)
    assert torch.equal(found, eager(model, ids)) and not torch.equal(found, before)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(generate(twin, ids, NEW, **STATIC), found)


def test_one_row_in_half_precision(models):  # noqa: F811
    """Products of one row run in our own kernel: compared by logits, not by tokens."""
    model, ids = models.retrofitted("qwen3", torch.bfloat16).cuda(), tokens(1, 20)
    options = {"return_dict_in_generate": True, "output_logits": True}
    found = generate(model, ids, NEW, **STATIC, **options)
    exact = copy.deepcopy(model).cpu().double()
    expected = exact(input_ids=found.sequences.cpu(), use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    got = torch.stack(found.logits, dim=1).double().cpu()
    assert (got - expected).norm() < 0.05 * expected.norm()
