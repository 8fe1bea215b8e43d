"""Adapter files: round trips, the released naming, and every way in which one can be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ahn_layers import (
    Compressor,
    GatedDeltaNet,
    Mamba2,
    adapter_parameters,
    load_adapter,
    outer,
    retrofit,
    save_adapter,
)
from ahn_layers.retrofit import find_retrofitted

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def make(compressor=GatedDeltaNet, model=None, **options):
    """A retrofitted tiny model with random memory weights."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval() if model is None else model
    retrofit(model, compressor, window_size=6, num_sinks=2, **options)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.normal_()
    return model


def weights(model):
    return {name: u.detach().clone() for name, u in adapter_parameters(model)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(u, other[name]) for name, u in one.items())


@pytest.mark.parametrize("options", [{}, {"shared_state": True}, {"layers": [0, 2]}])
@pytest.mark.parametrize("compressor", [GatedDeltaNet, Mamba2])
def test_round_trip(compressor, options, tmp_path):
    model = make(compressor, **options)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    other = make(compressor, **options)
    assert not same(weights(other), weights(model))
    assert load_adapter(other, tmp_path / "adapter") is other
    assert same(weights(other), weights(model))


def test_a_plain_model_is_retrofitted_as_the_adapter_says(tmp_path):
    model = make(shared_state=True, layers=[1], sink_positions="streaming", memory_positions="none")
    save_adapter(model, tmp_path)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    plain.load_state_dict({k: u for k, u in model.state_dict().items() if ".memory." not in k})
    load_adapter(plain, tmp_path)
    ours, theirs = find_retrofitted(model)[1], find_retrofitted(plain)[1]
    assert (ours.window, ours.layers, ours.options) == (theirs.window, theirs.layers, theirs.options)
    assert ours.memory_positions == theirs.memory_positions == "none"
    ids = torch.randint(0, 64, (1, 30))
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_the_window_may_be_chosen_while_loading(tmp_path):
    save_adapter(make(memory_positions="none"), tmp_path)
    model = load_adapter(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path, window_size=20, num_sinks=3)
    window = find_retrofitted(model)[1].window
    assert (window.window_size, window.num_sinks) == (20, 3) and load_adapter(model, tmp_path, window_size=20) is model
    with pytest.raises(ValueError, match="num_sinks=4: the model is retrofitted already, with num_sinks=3"):
        load_adapter(model, tmp_path, num_sinks=4)


def test_another_window_may_be_used(tmp_path):
    save_adapter(make(), tmp_path)
    model = retrofit(LlamaForCausalLM(LlamaConfig(**SIZES)), GatedDeltaNet, window_size=10)
    load_adapter(model, tmp_path)
    assert find_retrofitted(model)[1].window.window_size == 10


def test_a_class_of_the_user_is_found_by_name(tmp_path):
    class Decaying(Compressor):
        def fold(self, state, k, v):
            return 0.9 * state + outer(k, v)

    model = make(Decaying)
    save_adapter(model, tmp_path)
    plain = load_adapter(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path)
    assert same(weights(plain), weights(model))


def released(model, path, **changes):
    """The model's memory in the released naming, with changes: name -> tensor, or None to leave it out."""
    tensors = {}
    for name, u in weights(model).items():
        layer = name.split(".")[2]
        tensors[f"model.layers.{layer}.ahn.fn.{name.split('.compressor.')[1]}"] = u
    tensors["model.layers.0.ahn.fn.D"] = torch.ones(4)
    tensors["model.embed_tokens.weight"] = torch.ones(2, 2)  # full checkpoints hold the base as well
    for name, u in changes.items():
        tensors[name] = u
    save_file({name: u for name, u in tensors.items() if u is not None}, path)


@pytest.mark.parametrize("as_folder", [False, True])
def test_released_naming(tmp_path, as_folder):
    model, other = make(), make()
    released(model, tmp_path / "model.safetensors")
    load_adapter(other, tmp_path if as_folder else tmp_path / "model.safetensors")
    assert same(weights(other), weights(model))


KEY = "model.layers.1.ahn.fn."
BAD_WEIGHTS = {
    "missing": ({KEY + "a_proj.weight": None}, "layer 1 lacks 'a_proj.weight'"),
    "unknown": ({KEY + "c_proj.weight": torch.ones(2)}, "layer 1 has 'c_proj.weight'"),
    "shape": (
        {KEY + "a_proj.weight": torch.ones(4, 31)},
        r"layer 1 'a_proj.weight' has shape \(4, 31\), expected \(4, 32\)",
    ),
    "infinite": (
        {KEY + "A_log": torch.tensor([1.0, float("inf"), 1, 1])},
        "layer 1 'A_log' holds values that are not finite",
    ),
    "nan": ({KEY + "A_log": torch.full((4,), float("nan"))}, "not finite"),
    "layers": ({"model.layers.7.ahn.fn.A_log": torch.ones(4)}, r"for the layers \[0, 1, 2, 7\]"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_change_nothing(case, tmp_path):
    changes, message = BAD_WEIGHTS[case]
    path = tmp_path / "model.safetensors"
    model, other = make(), make()
    released(model, path, **changes)
    before = weights(other)
    with pytest.raises(ValueError, match=message):
        load_adapter(other, path)
    assert same(weights(other), before)


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_FOLDERS = {
    "memory positions": (
        lambda f: edit(f, memory_positions="none"),
        "has memory_positions='none', the model has 'absolute'",
    ),
    "version": (lambda f: edit(f, format_version=2), "adapter format version 2, this library reads 1"),
    "compressor": (lambda f: edit(f, compressor="Elephant"), "unknown compressor 'Elephant'"),
    "other compressor": (lambda f: edit(f, compressor="Mamba2"), "the adapter has compressor='Mamba2'"),
    "options": (lambda f: edit(f, compressor_options={"shared_state": True}), "the adapter has compressor_options"),
    "layers": (lambda f: edit(f, layers=[0, 1]), r"the adapter has layers=\[0, 1\]"),
    "base": (lambda f: edit(f, base_model_type="qwen2"), "base_model_type='qwen2', the model has 'llama'"),
    "json": (lambda f: (f / "adapter.json").write_text("{"), "adapter.json"),
    "no json": (lambda f: (f / "adapter.json").unlink(), "adapter.json"),
    "incomplete json": (lambda f: (f / "adapter.json").write_text('{"format_version": 1}'), "lacks 'compressor'"),
    "truncated": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:99]),
        "damaged",
    ),
    "foreign key": (lambda f: save_file({"x": torch.ones(1)}, f / "adapter.safetensors"), "unknown key 'x'"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_change_nothing(case, tmp_path):
    spoil, message = BAD_FOLDERS[case]
    model = make()
    save_adapter(model, tmp_path)
    spoil(tmp_path)
    other = make()
    before = weights(other)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(other, tmp_path)
    assert same(weights(other), before)


def test_a_wrong_base_is_refused(tmp_path):
    save_adapter(make(), tmp_path)
    mistral = make(model=MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)))
    with pytest.raises(ValueError, match="base_model_type='llama', the model has 'mistral'"):
        load_adapter(mistral, tmp_path)
    wider = make(model=LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64})))
    with pytest.raises(ValueError, match="the adapter has sizes="):
        load_adapter(wider, tmp_path)


def test_no_such_source(tmp_path):
    model = make()
    for source in (tmp_path / "nowhere", "someone/some-model", "no such thing"):
        with pytest.raises(FileNotFoundError, match=str(source).rsplit("/", maxsplit=1)[-1]):
            load_adapter(model, source)
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        load_adapter(model, tmp_path)


def test_a_file_without_memory_weights(tmp_path):
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no memory weights"):
        load_adapter(make(), tmp_path / "model.safetensors")


def test_released_files_need_a_retrofitted_model(tmp_path):
    released(make(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"call retrofit\(model, ...\) first"):
        load_adapter(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path)


def test_no_weights_to_save():
    model = retrofit(LlamaForCausalLM(LlamaConfig(**SIZES)), None, window_size=6)
    with pytest.raises(ValueError, match="without a compressor"):
        save_adapter(model, "anywhere")


def test_saving_replaces_an_earlier_adapter(tmp_path):
    save_adapter(make(), tmp_path)
    model = make()
    save_adapter(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    stored = load_file(tmp_path / "adapter.safetensors")
    assert torch.equal(stored["layers.0.A_log"], weights(model)["model.layers.0.self_attn.memory.compressor.A_log"])
    shutil.rmtree(tmp_path)
