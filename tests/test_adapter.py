"""Adapter files: round trips, the released naming, and every way in which one can be wrong."""

import copy
import gc
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ahn_layers import (
    Compressor,
    DeltaNet,
    GatedDeltaNet,
    HippocampalAttention,
    Mamba2,
    adapter_files,
    adapter_parameters,
    files,
    load_adapter,
    outer,
    retrofit,
    save_adapter,
)
from ahn_layers.fingerprint import differences, memory_identity
from ahn_layers.record import find_retrofitted

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def plain(seed=0, dtype=torch.float32, **sizes):
    """A tiny base model; another seed is a sibling, another checkpoint of the same architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).to(dtype).eval()


def make(compressor=GatedDeltaNet, model=None, **options):
    """A retrofitted tiny model with random memory weights."""
    model = plain() if model is None else model
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
    other = load_adapter(plain(), tmp_path)
    ours, theirs = find_retrofitted(model)[1], find_retrofitted(other)[1]
    assert (ours.window, ours.layers, ours.options) == (theirs.window, theirs.layers, theirs.options)
    assert ours.memory_positions == theirs.memory_positions == "none"
    ids = torch.randint(0, 64, (1, 30))
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_the_window_may_be_chosen_while_loading(tmp_path):
    save_adapter(make(memory_positions="none"), tmp_path)
    model = load_adapter(plain(), tmp_path, window_size=20, num_sinks=3)
    window = find_retrofitted(model)[1].window
    assert (window.window_size, window.num_sinks) == (20, 3) and load_adapter(model, tmp_path, window_size=20) is model
    with pytest.raises(ValueError, match="num_sinks=4: the model is retrofitted already, with num_sinks=3"):
        load_adapter(model, tmp_path, num_sinks=4)


def test_another_window_may_be_used(tmp_path):
    save_adapter(make(), tmp_path)
    model = retrofit(plain(), GatedDeltaNet, window_size=10)
    load_adapter(model, tmp_path)
    assert find_retrofitted(model)[1].window.window_size == 10


def test_a_class_of_the_user_is_found_by_name(tmp_path):
    class Decaying(Compressor):
        def fold(self, state, k, v):
            return 0.9 * state + outer(k, v)

    model = make(Decaying)
    save_adapter(model, tmp_path)
    assert same(weights(load_adapter(plain(), tmp_path)), weights(model))


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


def without_description(folder):
    """The file of the weights as earlier versions wrote it."""
    path = folder / "adapter.safetensors"
    save_file(load_file(path), path)


BAD_FOLDERS = {
    "memory positions": (
        lambda f: edit(f, memory_positions="none"),
        "has memory_positions='none', the model has 'absolute'",
    ),
    "version": (lambda f: edit(f, format_version=4), "adapter format version 4, this library reads 1 to 3"),
    "compressor": (lambda f: edit(f, compressor="Elephant"), "unknown compressor 'Elephant'"),
    "other compressor": (lambda f: edit(f, compressor="Mamba2"), "the adapter has compressor='Mamba2'"),
    "options": (lambda f: edit(f, compressor_options={"shared_state": True}), "the adapter has compressor_options"),
    "layers": (lambda f: edit(f, layers=[0, 1]), r"the adapter has layers=\[0, 1\]"),
    "base": (lambda f: edit(f, base_model_type="qwen2"), "base_model_type='qwen2', the model has 'llama'"),
    "json": (lambda f: (f / "adapter.json").write_text("{"), "adapter.json"),
    "no json": (lambda f: (without_description(f), (f / "adapter.json").unlink()), "missing, it says which compressor"),
    "other weights": (lambda f: without_description(f), "not the weights that"),
    "changed by hand": (lambda f: edit(f, library_version="9"), "description_sha256"),
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


SIBLINGS = {
    "family": (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
        "base_model_type='llama', the model has 'mistral'",
    ),
    "checkpoint": (lambda: plain(seed=1), "other values in "),
    "deeper": (lambda: plain(num_hidden_layers=4), "num_hidden_layers=3 there, 4 here"),
    "shallower": (lambda: plain(num_hidden_layers=2), "num_hidden_layers=3 there, 2 here"),
    "wider": (lambda: plain(hidden_size=64), "hidden_size=32 there, 64 here"),
    "vocabulary": (lambda: plain(vocab_size=65), "vocab_size=64 there, 65 here"),
    "rotation": (
        lambda: plain(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "rope_parameters.rope_theta=10000.0 there, 500000.0 here",
    ),
}


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("case", SIBLINGS)
def test_another_base_is_refused(case, retrofitted, tmp_path):
    build, message = SIBLINGS[case]
    save_adapter(make(), tmp_path)
    other = make(model=build()) if retrofitted else build()
    before, names = copy.deepcopy(other.state_dict()), [name for name, _ in other.named_modules()]
    with pytest.raises(ValueError) as error:
        load_adapter(other, tmp_path)
    if not retrofitted or case not in ("deeper", "shallower", "wider"):  # whose memory does not fit either
        assert message in str(error.value) and "check_base=False" in str(error.value)
    assert same(other.state_dict(), before) and [name for name, _ in other.named_modules()] == names


@pytest.mark.parametrize("case", ["family", "checkpoint", "vocabulary", "deeper"])
def test_the_check_of_the_base_can_be_overridden(case, tmp_path):
    model = make(layers=[0, 1])
    save_adapter(model, tmp_path)
    other = load_adapter(SIBLINGS[case][0](), tmp_path, check_base=False)
    assert same(weights(other), weights(model)) and find_retrofitted(other)[1].layers == [0, 1]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("there", DTYPES)
@pytest.mark.parametrize("here", DTYPES)
def test_the_same_base_in_another_dtype_is_the_same(there, here, tmp_path):
    save_adapter(make(model=plain(dtype=there)), tmp_path)
    load_adapter(plain(dtype=here), tmp_path)
    narrow = plain(dtype=torch.bfloat16).to(here)  # a checkpoint in bfloat16, loaded wider
    save_adapter(make(model=plain(dtype=torch.bfloat16).to(there)), tmp_path)
    load_adapter(narrow, tmp_path)
    with pytest.raises(ValueError, match="other values in"):
        load_adapter(plain(seed=1, dtype=here), tmp_path)


def test_a_slightly_trained_base_is_another_one(tmp_path):
    save_adapter(make(), tmp_path)
    other = plain()
    with torch.no_grad():
        for u in other.parameters():
            u.mul_(1 + 1e-6)
    with pytest.raises(ValueError, match="other values in"):
        load_adapter(other, tmp_path)


def test_weights_that_cannot_be_read_are_not_compared(tmp_path):
    """Quantized and offloaded ones; the config still is."""
    save_adapter(make(), tmp_path)
    other = plain(seed=1)
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    found = list(differences(json.loads((tmp_path / "adapter.json").read_text())["base"], other))
    assert found and all("embed" in text or "norm" in text for text in found)
    assert not list(differences(json.loads((tmp_path / "adapter.json").read_text())["base"], plain().to("meta")))


def test_a_bare_decoder_is_the_same_base(tmp_path):
    model = make()
    save_adapter(model, tmp_path)
    assert same(load_adapter(plain().model, tmp_path).state_dict(), model.model.state_dict())
    with pytest.raises(ValueError, match="other values in"):
        load_adapter(plain(seed=1).model, tmp_path)


def test_adapters_without_a_fingerprint_load(tmp_path):
    """Those of earlier versions."""
    model = make()
    save_adapter(model, tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    del description["base"], description["weights_sha256"], description["description_sha256"]
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    assert same(weights(load_adapter(plain(seed=1), tmp_path)), weights(model))


# --- completely or not at all


def fingerprint_of(model):
    """All that a retrofit changes, and all weights."""
    modules = {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    return modules, hooks, model.config._attn_implementation, {n: u.clone() for n, u in model.state_dict().items()}


def unchanged(model, before):
    now = fingerprint_of(model)
    return now[:3] == before[:3] and same(now[3], before[3])


REFUSED = {
    "nan": lambda u: u | {"layers.1.A_log": torch.full((4,), float("nan"))},
    "missing": lambda u: {name: value for name, value in u.items() if name != "layers.2.a_proj.weight"},
    "unknown": lambda u: u | {"layers.2.c_proj.weight": torch.ones(2)},
    "shape": lambda u: u | {"layers.2.a_proj.weight": torch.ones(4, 31)},
    "layer": lambda u: {name: value for name, value in u.items() if not name.startswith("layers.2.")},
    "of another save": lambda u: {name: value + 1 for name, value in u.items()},
}


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_adapter_changes_nothing(case, retrofitted, tmp_path):
    save_adapter(make(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    save_file(REFUSED[case](load_file(path)), path)
    model = make() if retrofitted else plain()
    before = fingerprint_of(model)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_adapter(model, tmp_path)
    assert unchanged(model, before)
    model(torch.arange(20)[None])
    if not retrofitted:
        retrofit(model, GatedDeltaNet, window_size=6)


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_ctrl_c_while_weights_are_copied(after, retrofitted, tmp_path, monkeypatch):
    save_adapter(make(), tmp_path)
    model = make() if retrofitted else plain()
    before, calls = fingerprint_of(model), []

    def interrupted(value, parameter):
        calls.append(value)
        if len(calls) > after:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr("ahn_layers.adapter._as_sharded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    assert len(calls) == after + 1 and unchanged(model, before)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_ctrl_c_in_retrofit_leaves_the_model_alone(after, monkeypatch):
    model, usual, calls = plain(), HippocampalAttention.__init__, []
    before, ids = fingerprint_of(model), torch.arange(30)[None]
    expected = model(ids).logits

    def interrupted(self, *args, **kwargs):
        usual(self, *args, **kwargs)
        calls.append(self)
        if len(calls) > after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HippocampalAttention, "__init__", interrupted)
        if after == 3:  # all blocks are replaced
            patch.setattr("ahn_layers.huggingface.install.CompiledCall", interrupt)
        with pytest.raises(KeyboardInterrupt):
            retrofit(model, GatedDeltaNet, window_size=6)
    assert unchanged(model, before) and torch.equal(model(ids).logits, expected)
    assert retrofit(model, GatedDeltaNet, window_size=6) is model


# --- the files themselves


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_ordinary_permissions(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_adapter(make(), tmp_path)
        (tmp_path / "ordinary").touch()
    finally:
        os.umask(before)
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {expected}


def test_a_crash_between_the_two_files(tmp_path, monkeypatch):
    save_adapter(make(), tmp_path)
    other = make()
    with monkeypatch.context() as patch:
        write = files.write_atomically

        def crash(path, data):
            if path.name == "adapter.json":
                raise OSError("power cut")
            write(path, data)

        patch.setattr(adapter_files, "write_atomically", crash)
        with pytest.raises(OSError, match="power cut"):
            save_adapter(other, tmp_path)
    assert same(weights(load_adapter(plain(), tmp_path)), weights(other))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    save_adapter(make(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PermissionError) as error:
        save_adapter(make(), tmp_path)
    monkeypatch.undo()
    assert "cannot write adapter.safetensors into this folder (Permission denied)" in str(error.value)
    assert str(tmp_path) in str(error.value) and "tmp'" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_failed_write_leaves_nothing_behind(fails, tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    monkeypatch.setattr(os, "fsync" if fails == "write" else "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [u.name for u in tmp_path.iterdir()] == ["file"]


def test_options_that_are_no_json_values(tmp_path):
    class Picky(GatedDeltaNet):
        def __init__(self, *args, choice=None, **kwargs):
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match=r"compressor_options=.*cannot be written as JSON"):
        save_adapter(make(Picky, choice=object()), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model = make(Picky, choice=(1, 2))  # JSON knows lists only
    save_adapter(model, tmp_path)
    assert same(weights(load_adapter(make(Picky, choice=(1, 2)), tmp_path)), weights(model))
    assert same(weights(load_adapter(plain(), tmp_path)), weights(model))


# --- class names


def define(module="somewhere", qualname="Twice"):
    """A new compressor class called ``Twice``."""

    def fold(self, state, k, v):
        return state + outer(k, v)

    return type("Twice", (Compressor,), {"fold": fold, "__module__": module, "__qualname__": qualname})


def test_two_classes_cannot_have_one_name():
    first = define()
    with pytest.raises(ValueError, match=r"second compressor class is called 'Twice': elsewhere.Twice, after some"):
        define("elsewhere")
    with pytest.raises(ValueError, match=r"somewhere.Outer.Twice, after somewhere.Twice"):
        define(qualname="Outer.Twice")
    with pytest.raises(ValueError, match="called 'GatedDeltaNet'"):
        type("GatedDeltaNet", (DeltaNet,), {"__module__": "elsewhere"})
    assert Compressor.by_name["Twice"] is first and Compressor.by_name["GatedDeltaNet"] is GatedDeltaNet


def test_a_class_that_is_defined_again_replaces_the_old_one():
    first = define()
    second = define()
    assert Compressor.by_name["Twice"] is second is not first


def test_a_class_that_nobody_can_use_any_more_does_not_count():
    gc.disable()
    try:
        define()
        assert define("elsewhere") is Compressor.by_name["Twice"]
    finally:
        gc.enable()


# --- which memory a cache was made with


def test_memory_identity(tmp_path):
    model = make()
    found = memory_identity(model)
    assert len(found.split()[-1]) == 64 and memory_identity(model) == found
    assert memory_identity(copy.deepcopy(model)) == found and memory_identity(torch.nn.Sequential(model)) == found
    save_adapter(model, tmp_path)
    assert memory_identity(load_adapter(plain(), tmp_path, window_size=9)) == found
    assert memory_identity(make()) != found and memory_identity(make(memory_positions="none")) != found
    assert memory_identity(retrofit(plain(), None, window_size=6)) == memory_identity(
        retrofit(plain(), None, window_size=9)
    )
    assert memory_identity(copy.deepcopy(model).to("meta")) == ""


CHANGES = {
    "in place": lambda p: p.mul_(2),
    "one value": lambda p: p.flatten()[-1:].add_(1),
    "other storage": lambda p: setattr(p, "data", p.data * 2),
    "copied": lambda p: p.copy_(p * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_memory_identity_follows_the_weights(change):
    model = make()
    found = memory_identity(model)
    with torch.no_grad():
        CHANGES[change](list(adapter_parameters(model))[-1][1])
    assert memory_identity(model) != found


def test_memory_identity_of_other_parameters():
    model, other = make(), make()
    kept = dict(adapter_parameters(model))  # the old ones live on
    found = memory_identity(model), memory_identity(other)
    model.load_state_dict(other.state_dict(), assign=True)
    assert kept and found[0] != memory_identity(model) == found[1]


def test_memory_identity_is_cheap_while_nothing_changes(monkeypatch):
    model = make()
    found = memory_identity(model)
    monkeypatch.setattr("hashlib.sha256", None)
    assert memory_identity(model) == found


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
        load_adapter(plain(), tmp_path)


def test_no_weights_to_save():
    model = retrofit(plain(), None, window_size=6)
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
