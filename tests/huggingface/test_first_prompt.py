"""When the kernels of a long prompt are compiled ahead: once, on a GPU, for a prompt that outgrows the window."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ahn_layers import GatedDeltaNet, Mamba2, restore, retrofit, window_only
from ahn_layers.huggingface import first_prompt, prefill

OPTIONS = {"max_new_tokens": 2, "do_sample": False}


def make_model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().bfloat16()


@pytest.fixture
def begun(monkeypatch):
    """What has been asked to be compiled, where a model says that it is on a GPU."""
    calls = []
    monkeypatch.setattr(first_prompt, "compile_ahead", lambda function, device: calls.append((function, device)))
    monkeypatch.setattr(first_prompt, "only_device", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(prefill.Prefill, "_is_on_gpu", lambda self: True)
    return calls


def test_the_first_prompt_that_outgrows_the_window_begins_it(begun):
    model = retrofit(make_model(), GatedDeltaNet, window_size=8, num_sinks=2)
    ids = torch.randint(1, 64, (2, 50))
    model.generate(ids[:, :10], **OPTIONS)
    model.generate(ids, disable_compile=True, **OPTIONS)
    model.generate(ids, prefill_chunk_size=16, **OPTIONS)
    with window_only(model):
        model.generate(ids, **OPTIONS)
    assert not begun
    expected = model.generate(ids, **OPTIONS)
    ((function, device),) = begun  # once for three layers that are alike
    store, on, dtype, rows, lengths = function.args
    assert on == device == torch.device("cuda", 0) and (dtype, rows, lengths) == (torch.bfloat16, 2, [50])
    assert any(store is block.store for block in prefill._blocks(model))
    assert torch.equal(model.generate(ids, **OPTIONS), expected)
    assert len(begun) == 1
    model = retrofit(restore(model), Mamba2, window_size=8, num_sinks=2)
    model.generate(ids, **OPTIONS)
    assert len(begun) == 2, "another memory has other kernels"
    retrofit(make_model().float(), GatedDeltaNet, window_size=8).generate(ids, **OPTIONS)
    assert len(begun) == 2


def test_nothing_begins_on_a_cpu(monkeypatch):
    monkeypatch.setattr(prefill, "compile_for", lambda *_: pytest.fail("asked for"))
    retrofit(make_model(), GatedDeltaNet, window_size=8).generate(torch.randint(1, 64, (1, 50)), **OPTIONS)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(131_072, [8192] * 6), (70_000, [8192] * 6 + [4464]), (40_000, [8192] * 4 + [7232]), (9, [9])],
)
def test_pieces_that_launch_what_all_of_them_do(length, expected):
    assert first_prompt.pieces(length, 8192, 32_768) == expected


SCRIPT = """
import json, threading, torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton import knobs
from ahn_layers import GatedDeltaNet, retrofit

found = []
def heard(*, src, cache_hit, **_):
    if "ahn_layers" in getattr(getattr(src, "fn", None), "__module__", ""):
        found.append((src.name, threading.current_thread().name, cache_hit))

knobs.compilation.listener = heard
config = LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=None, pad_token_id=0,
)
with torch.device("cuda"):
    model = retrofit(LlamaForCausalLM(config).eval().bfloat16(), GatedDeltaNet, window_size=20_000, num_sinks=32)
    model.generate(torch.randint(1, 64, (1, 50_001)), max_new_tokens=40, do_sample=False)  # enough to be recorded
print(json.dumps(found))
"""


@pytest.mark.gpu
def test_on_a_gpu_whatever_is_launched_has_been_compiled_in_threads(tmp_path):
    """Of a process without compiled kernels, which reads a prompt and decodes; and nothing is compiled twice."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _, _ in found} >= {"_join", "_l2", "_solve_chunks", "_turn", "_attend_and_fold", "_matvec"}
    assert all(thread.startswith("compile-ahead") and not hit for _, thread, hit in found), found
