"""The files of an adapter: damaged or missing ones are refused, and a crash leaves whole ones."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ahn_layers import adapter_files, files, load_adapter, retrofit, save_adapter

from .adapters import interrupt, make, plain, released, same, weights

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
