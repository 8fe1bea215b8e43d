"""Weights that torchao has quantized: classes of tensors that know themselves what a product with them is."""

import pytest
import torch
from torch import nn

from ahn_layers import GatedDeltaNet, HippocampalCache, SalientSlots, restore, retrofit
from ahn_layers.huggingface.compiled import matvec

from ..models import base, tokens

quantization = pytest.importorskip("torchao.quantization")


@pytest.fixture
def quantize():
    return lambda model, **options: quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), **options)


@torch.no_grad()
def test_a_quantized_base(quantize):
    model, ids = base(dtype=torch.bfloat16), tokens(1, 60)
    quantize(model)
    before = model(ids[:, :12]).logits
    retrofit(model, GatedDeltaNet, window_size=16, num_sinks=2, eviction=SalientSlots(8))
    assert torch.equal(model(ids[:, :12]).logits, before)
    cache, whole = HippocampalCache(), model(ids).logits
    pieces = torch.cat([model(ids[:, i : i + 7], cache=cache).logits for i in range(0, 60, 7)], dim=1)
    assert (pieces - whole).norm() < 0.02 * whole.norm()
    restore(model)
    assert torch.equal(model(ids[:, :12]).logits, before)


@torch.no_grad()
def test_a_memory_is_left_out_or_refused(quantize):
    model, ids = retrofit(base(dtype=torch.bfloat16), GatedDeltaNet, window_size=16, num_sinks=2), tokens(1, 40)
    quantize(model, filter_fn=lambda module, name: isinstance(module, nn.Linear) and ".memory." not in name)
    assert model(ids).logits.isfinite().all()
    quantize(model, filter_fn=lambda module, name: isinstance(module, nn.Linear) and ".memory." in name)
    with pytest.raises(ValueError, match=r"weight is a \w+Tensor: expected a tensor whose bytes can be read"):
        model(ids)


def test_quantized_layers_are_not_merged(quantize, monkeypatch):
    layers, merged = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 48)]).bfloat16(), []
    quantize(layers)
    monkeypatch.setattr(matvec, "has_triton", lambda u: True)

    def backend(graph, _):
        matvec.merge_matvecs(graph.graph)
        merged.extend(node for node in graph.graph.nodes if "matvec" in str(node.target))
        return graph.forward

    x = torch.randn(1, 1, 64).bfloat16()
    with torch.no_grad():
        torch.compile(lambda x: [layer(x) for layer in layers], backend=backend)(x)
    assert not merged
