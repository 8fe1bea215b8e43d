"""A cache in a file is resumed bit for bit, and a damaged file is refused."""

# ruff: noqa: F811 - fixtures are imported

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahn_layers import HippocampalCache
from ahn_layers.huggingface.cache_check import check_loaded
from ahn_layers.huggingface.layer_values import describe, rebuild, tensors_of

from ..methods import KINDS
from ..models import positions, retrofitted, tokens
from .caching import LONG, every_length, fast, go_on, model, read, same, tensors  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("compressor", [*KINDS, None])
@every_length
def test_saved_and_resumed_bit_for_bit(length, compressor, tmp_path):
    model = retrofitted(compressor=compressor)
    cache = read(model, tokens(2, length))
    cache.save(tmp_path / "cache.safetensors")
    resumed = HippocampalCache.load(tmp_path / "cache.safetensors")
    assert same(resumed, tensors(cache)) and resumed.get_seq_length() == length
    assert torch.equal(go_on(model, resumed), go_on(model, cache))
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_kept(dtype, tmp_path):
    model = retrofitted(dtype=dtype)
    cache = read(model, tokens(2, LONG))
    cache.save(tmp_path / "cache")
    resumed = HippocampalCache.load(tmp_path / "cache")
    assert resumed.layers[0].keys.dtype == dtype and resumed.layers[0].state.memory.dtype == torch.float32
    assert torch.equal(go_on(model, resumed), go_on(model, cache))


def test_a_state_is_lent_for_a_call_only():
    """Somebody else who continues the state of a cache does not change it."""
    model = retrofitted()
    cache = read(model, tokens(2, LONG))
    for _ in range(2):
        assert not any(layer.state.inplace for layer in cache.layers)
        go_on(model, cache)


def test_padded_rows_are_resumed(model, tmp_path):
    ids, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :-3] = 0
    cache = read(model, ids, attention_mask=mask, position_ids=positions(mask))
    cache.save(tmp_path / "cache")
    assert torch.equal(go_on(model, HippocampalCache.load(tmp_path / "cache")), go_on(model, cache))


ELSEWHERE = """
import sys, torch
torch.set_num_threads(1)
from ahn_layers import HippocampalCache
from tests.models import logits, retrofitted, tokens
cache = HippocampalCache.load(sys.argv[1])
torch.save(logits(retrofitted(), tokens(2, 11, seed=77), 1, cache), sys.argv[2])
"""


def test_resumed_in_another_process(model, tmp_path):
    cache = read(model, tokens(2, LONG))
    cache.save(tmp_path / "cache")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "cache"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(tmp_path / "logits"), go_on(model, cache, 11))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(model, step, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    read(model, tokens(1, 3)).save(path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        read(model, tokens(1, LONG)).save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def with_header(change):
    """Damage to the header of a safetensors file."""

    def spoil(data):
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return spoil


DAMAGE = {
    "truncated": (lambda data: data[: len(data) // 2], "damaged or truncated"),
    "one byte short": (lambda data: data[:-1], "damaged or truncated"),
    "empty": (lambda data: b"", "damaged or truncated"),
    "no safetensors": (lambda data: b"PK" + data, "damaged or truncated"),
    "another version": (with_header(lambda header: header["__metadata__"].update(version="2")), "format version 2"),
    "no version": (with_header(lambda header: header["__metadata__"].pop("version")), "format version None"),
    "weights": (with_header(lambda header: header.pop("__metadata__")), "expected a file of format 'ahn_layers.cache'"),
    "no description": (with_header(lambda header: header["__metadata__"].pop("description")), "damaged"),
    "half a description": (with_header(lambda header: header["__metadata__"].update(description='{"lay')), "damaged"),
    "a layer missing": (with_header(lambda header: header.update({"9.k": header.pop("1.k")})), "damaged"),
}


@pytest.mark.parametrize("spoil, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_by_name(model, spoil, message, tmp_path):
    path = tmp_path / "cache.safetensors"
    read(model, tokens(1, LONG)).save(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        HippocampalCache.load(path)
    assert str(path) in str(error.value)


def test_files_of_another_kind_are_refused_by_name(model, tmp_path):
    path = tmp_path / "state.safetensors"
    read(model, tokens(1, LONG)).layers[0].state.save(path)
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a file of format 'ahn_layers\.cache'"):
        HippocampalCache.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        HippocampalCache.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("length", [0, 5, 23])
@pytest.mark.parametrize("name", ["falcon_h1", "lfm2"])  # beside the memory, in place of it
def test_a_recurrence_is_copied_saved_and_reordered(name, length, tmp_path):
    model, ids, more = retrofitted(name), torch.randint(1, 16, (3, 30)), torch.randint(1, 16, (3, 4))

    def run(cache, ids):
        with torch.no_grad():
            return model(ids, cache=cache, use_cache=True).logits

    cache = HippocampalCache()
    run(cache, ids[:, : max(length, 1)])
    if length == 0:
        cache.reset()
    before, expected = tensors(cache), run(cache.clone(), more)
    assert same(cache, before) and cache.nbytes == sum(u.nbytes for u in before.values())
    cache.save(tmp_path / "cache.safetensors")
    assert torch.equal(run(HippocampalCache.load(tmp_path / "cache.safetensors"), more), expected)
    rows, repeated = cache.clone(), cache.clone()
    if length:
        found = run(cache.reorder(torch.tensor([2, 0])), more[[2, 0]])
        rows.batch_select_indices(torch.tensor([1]))
        repeated.batch_repeat_interleave(2)
        for one, other in (
            (found, expected[[2, 0]]),
            (run(rows, more[1:2]), expected[1:2]),
            (run(repeated, more.repeat_interleave(2, dim=0)), expected.repeat_interleave(2, dim=0)),
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own, _: own["linear"][0].update(width="4"), "expected a whole number"),
        (lambda own, _: own["linear"][0].update(begun=1), "whether it has begun"),
        (lambda own, held: held.update({"conv_states.0": held["conv_states.0"][..., :2]}), "expected 4 columns"),
        (lambda own, held: held.update({"recurrent_states.0": held["recurrent_states.0"][:1]}), "rows"),
    ],
)
def test_forged_recurrences_are_refused(change, said):
    model, cache = retrofitted("falcon_h1"), HippocampalCache()
    with torch.no_grad():
        model(torch.ones(2, 9, dtype=torch.long), cache=cache, use_cache=True)
    own, held = describe(cache.layers[0]), dict(tensors_of(cache.layers[0]))
    check_loaded(rebuild(own, held), own)
    change(own, held)
    with pytest.raises(ValueError, match=said):
        check_loaded(rebuild(own, held), own)


def test_a_convolution_that_records_its_past_is_not_saved(tmp_path):
    model, cache = retrofitted("lfm2"), HippocampalCache()
    with torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.long), cache=cache, use_cache=True)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="LinearAttentionLayer cannot be copied or saved"):
        cache.save(tmp_path / "cache.safetensors")
