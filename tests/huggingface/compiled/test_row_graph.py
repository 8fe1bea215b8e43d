"""One CUDA graph for a bucket of rows: each that comes goes on as alone. Needs a GPU."""

import importlib
import sys

import pytest
import torch

from .graphs import models  # noqa: F401 - a fixture: the library without checks of shapes, which cannot be traced

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("slots", [None, 3], ids=["all folded", "slots"])
def test_a_recorded_step_serves_every_row_that_comes(slots, models, monkeypatch):  # noqa: F811
    ahn, recordings = sys.modules["ahn_layers"], []
    recording = importlib.import_module("ahn_layers.huggingface.compiled.step_graph").Recording
    usual = recording.__init__
    monkeypatch.setattr(recording, "__init__", lambda *args: (recordings.append(1), usual(*args))[1])
    eviction = None if slots is None else ahn.SalientSlots(slots, score="value_norm")
    model = models.retrofitted(dtype=torch.float32, eviction=eviction).cuda()

    def prompt(i, length):
        return models.tokens(1, length, seed=i).cuda()

    def reader(i, length):
        cache = ahn.HippocampalCache()
        models.logits(model, prompt(i, length), length, cache)
        return cache

    cache, step = ahn.HippocampalCache.join([reader(0, 5)], rows=4), model.get_compiled_call(None)
    texts = [prompt(0, 5)] * 4
    with torch.no_grad():
        for turn in range(12):
            row, length = turn % 4, (1, 30, models.CAPACITY, 200, 3)[turn % 5]
            texts[row] = prompt(turn, length)
            cache.put(row, reader(turn, length))
            for _ in range(3):
                new = models.tokens(4, 1, seed=turn).cuda()
                positions = torch.tensor([[text.shape[1]] for text in texts], device="cuda")
                out = step(input_ids=new, position_ids=positions, cache=cache, use_cache=True).logits
                texts = [torch.cat((text, token[None]), dim=1) for text, token in zip(texts, new, strict=True)]
    assert len(recordings) == 1
    for row in range(4):
        expected = models.logits(model, texts[row])[:, -1:]
        torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-3, atol=1e-2)
