"""A model on the second GPU, one on two, one whose weights are elsewhere. Most of it needs two GPUs."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from ..huggingface.compiled.graphs import models  # noqa: F401 - a fixture: the library without checks of shapes, which cannot be traced
from ..ops.test_decode import check_attention, check_memory
from ..ops.test_triton import check_join, check_loss, check_normalizations, check_rotary, check_scans

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FIRST, SECOND = "cuda:0", "cuda:1"
LAYERS, NEW = 4, 24


def test_whatever_starts_a_kernel_does_so_on_its_gpu():
    """Without a GPU: every function that starts one, or that is an operation, says so."""
    launching = []
    for path in sorted(Path(find_spec("ahn_layers").origin).parent.rglob("triton_*.py")):
        for function in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)):
            decorators = [ast.unparse(node) for node in function.decorator_list]
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            starts = any(isinstance(call, ast.Subscript) for call in calls) and "triton.jit" not in decorators
            assert not any("custom_op" in u for u in decorators), f"{path.name}: {function.name}: use operator"
            says_so = "on_its_gpu" in decorators or any(u.startswith("operator(") for u in decorators)
            if says_so or (starts and not function.name.startswith("_")):
                launching.append(function.name)
                assert says_so, f"{path.name}: {function.name}"
    assert len(launching) >= 14


def retrofitted(place):
    """A small model in half precision, placed by a function, then retrofitted; heads large enough for all kernels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, eos_token_id=None, pad_token_id=0, **sizes)
    model = place(LlamaForCausalLM(config).eval().bfloat16())
    ahn = sys.modules["ahn_layers"]
    ahn.retrofit(model, ahn.GatedDeltaNet, window_size=40, num_sinks=8, memory_positions="none")
    with torch.no_grad():
        for _, parameter in ahn.adapter_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape))  # devices draw other numbers
    return model


def on_two(model):
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": i * 2 // LAYERS for i in range(LAYERS)}
    return dispatch_model(model, places)


def padded(rows=2, length=300):
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("skips", [True, False])
def test_hooks_that_move_what_a_layer_gets(skips):
    """What ``device_map`` puts around layers, here from the CPU to the CPU; a cache must not be copied on the way."""
    model, inputs = retrofitted(lambda model: model), padded()
    options = [{"max_new_tokens": 6, "do_sample": False, **u} for u in ({}, {"cache_implementation": "static"})]
    expected = [model.generate(**inputs, **u) for u in options]
    keys = model._skip_keys_device_placement if skips else None
    attach_align_device_hook_on_blocks(model, {name: "cpu" for name, _ in model.named_modules()}, skip_keys=keys)
    for u, tokens in zip(options, expected, strict=True):
        assert torch.equal(model.generate(**inputs, **u), tokens)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_weights_that_come_when_they_are_used(offload, tmp_path):
    options = {"execution_device": torch.device("cpu")} | ({"offload_dir": tmp_path} if offload is disk_offload else {})
    one, other = retrofitted(lambda model: model), retrofitted(lambda model: offload(model, **options))
    assert other.device.type == "meta" and other.model.layers[0].self_attn.memory.compressor.A_log.device.type == "cpu"
    inputs = padded()
    with torch.no_grad():
        assert torch.equal(one(**inputs).logits, other(**inputs).logits)
    for more in ({}, {"cache_implementation": "static"}):
        more |= {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(one.generate(**inputs, **more), other.generate(**inputs, **more))


def test_a_model_on_several_devices_decodes_as_it_is():
    """Compiled in pieces between devices, it would take minutes to begin."""
    model = retrofitted(lambda model: model)
    model.elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
    assert model.get_compiled_call(None) == model.__call__
    assert model.get_compiled_call(CompileConfig(backend="eager")) != model.__call__


@two_gpus
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("place", [lambda model: model.to(SECOND), on_two], ids=["the second", "two"])
def test_a_model_elsewhere_is_the_same(place):
    one, other = retrofitted(lambda model: model.to(FIRST)), retrofitted(place)
    ways = [{"cache_implementation": None}, {"disable_compile": True}, *[{}] * (place is not on_two)]
    for inputs in (padded(), {name: u[1:] for name, u in padded().items()}):
        logits, tokens = [], []
        for model in (one, other):
            here = {name: u.to(model.device) for name, u in inputs.items()}
            with torch.no_grad():
                logits.append(model(**here, use_cache=False).logits.float().cpu())
            options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
            tokens.append([model.generate(**here, **options | changes).cpu() for changes in ways])
        assert torch.isfinite(logits[1]).all()
        torch.testing.assert_close(*logits, rtol=0, atol=1e-2)
        for mine, its in zip(*tokens, strict=True):
            assert torch.equal(mine, its)


@two_gpus
@pytest.mark.usefixtures("models")
def test_gradients_on_two_gpus():
    ids, found = padded()["input_ids"][1:], []
    for place in (lambda model: model.to(FIRST), on_two):
        model = retrofitted(place)
        here = ids.to(model.device)
        names, memory = zip(*sys.modules["ahn_layers"].adapter_parameters(model), strict=True)
        found.append(torch.autograd.grad(model(input_ids=here, labels=here, use_cache=False).loss, memory))
    for name, mine, its in zip(names, *found, strict=True):
        torch.testing.assert_close(mine.cpu(), its.cpu(), rtol=0.02, atol=0.02 * float(mine.abs().max()), msg=name)


@two_gpus
def test_kernels_on_the_second_gpu():
    check_normalizations(SECOND, torch.bfloat16)
    check_join(SECOND, torch.bfloat16)
    check_rotary(SECOND, torch.bfloat16)
    check_loss(SECOND, torch.bfloat16)
    check_scans(SECOND, torch.bfloat16, 130, 1, 1, 2, 40, 48)
    check_attention(SECOND, torch.bfloat16, 0.02, 1, 8, 2, 700, 128, 128, 3)
    check_memory(SECOND, 64, 64, 3, 3)
