"""Parity with the reference: logits and states of tiny models, made by the public AHN implementation in float32.

Each file in ``golden/`` holds base and memory weights under their released names, a prompt, the logits of one prefill
and the single steps after it, and the final states.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ahn_layers import load_adapter, retrofit

from ..methods import RELEASED

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
COMPRESSORS = {compressor.__name__: compressor for compressor in RELEASED}
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "attention_bias",
)  # fmt: skip


@pytest.fixture(params=sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def golden(request):
    """A retrofitted model with the file's weights, and the file's tensors and metadata."""
    path = GOLDEN / f"{request.param}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config_class, model_class = FAMILIES[metadata["arch"]]
    config = {name: value for name, value in json.loads(metadata["config"]).items() if name in KEPT}
    model = model_class(config_class(**config, use_sliding_window=False, tie_word_embeddings=False)).eval()
    base = {name: u for name, u in tensors.items() if ".ahn." not in name and not name.startswith("__")}
    assert model.load_state_dict(base, strict=True)
    window, sinks = int(metadata["sliding_window"]), int(metadata["num_attn_sinks"])
    retrofit(model, COMPRESSORS[metadata["compressor"]], window_size=window, num_sinks=sinks)
    return load_adapter(model, path), tensors, metadata


def logits_and_states(model, ids, cuts):
    """Logits over all pieces, and the state of every layer at the end."""
    cache, logits = None, []
    with torch.no_grad():
        for a, b in pairwise([0, *cuts, ids.shape[1]]):
            out = model(ids[:, a:b], cache=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1), [layer.state.memory for layer in cache.layers]


@pytest.mark.parametrize("cutting", ["prefill and steps", "one pass", "steps", "random"])
def test_logits_and_states(golden, cutting):
    model, tensors, metadata = golden
    ids = tensors["__input_ids"]
    length, prefill = ids.shape[1], int(metadata["prefill_len"])
    cuts = {
        "prefill and steps": range(prefill, length),
        "one pass": [],
        "steps": range(1, length),
        "random": sorted(torch.randperm(length - 1)[:6].add(1).tolist()),
    }[cutting]
    logits, states = logits_and_states(model, ids, cuts)
    torch.testing.assert_close(logits, tensors["__logits"], rtol=0, atol=2e-4)
    for i, state in enumerate(states):
        expected = tensors[f"__state.{i}"]
        expected = expected.mT if metadata["compressor"] == "Mamba2" else expected  # stored value dimension first
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


def test_the_memory_matters(golden):
    """Without the memory the logits differ by far more than the tolerance above: the comparison can fail."""
    from ahn_layers import window_only

    model, tensors, _ = golden
    with window_only(model), torch.no_grad():
        logits = model(tensors["__input_ids"]).logits
    assert (logits - tensors["__logits"]).abs().max() > 2e-3


# Qwen2.5 3B, 7B, 14B: layers, hidden size, query heads, key/value heads; parameters in millions (the paper's table)
SHAPES = {"3B": (36, 2048, 16, 2), "7B": (28, 3584, 28, 4), "14B": (48, 5120, 40, 8)}
PARAMETERS = {
    "GatedDeltaNet": {"3B": 12.98, "7B": 21.27, "14B": 60.95},
    "DeltaNet": {"3B": 11.8, "7B": 18.5, "14B": 51.1},
    "Mamba2": {"3B": 11.9, "7B": 18.6, "14B": 51.4},
}


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_parameter_counts_of_the_paper(name, size):
    """Of one layer, times the layers."""
    layers, hidden_size, num_heads, num_kv_heads = SHAPES[size]
    config = Qwen2Config(
        vocab_size=128, hidden_size=hidden_size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    before = sum(p.numel() for p in model.parameters())
    retrofit(model, COMPRESSORS[name], window_size=32_640, num_sinks=128)
    added = layers * (sum(p.numel() for p in model.parameters()) - before)
    expected = PARAMETERS[name][size]
    digits = len(str(expected).split(".")[1])
    assert abs(added / 1e6 - expected) <= 10**-digits, added  # the paper rounds some figures and cuts others
