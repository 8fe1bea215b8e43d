"""The cache of a retrofitted model is a value: forked, reordered, moved, saved, rolled back, and never mixed up."""

import copy
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from ahn_layers import (
    HippocampalCache,
    Mamba2,
    full_attention,
    memory_report,
    restore,
    window_only,
)
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.layer_values import tensors_of
from ahn_layers.huggingface.recording import MAX_ROLLBACK
from ahn_layers.huggingface.static_layer import StaticMemoryLayer

from ..methods import KINDS
from ..models import CAPACITY, FAMILIES, base, generate, logits, positions, retrofitted, tokens

ROOT = Path(__file__).parents[2]
LONG = 3 * CAPACITY + 1
LENGTHS = {"in the sinks": 1, "brim": CAPACITY, "beyond": LONG}

every_length = pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)


@pytest.fixture(autouse=True)
def fast(unchecked, monkeypatch):
    """Shapes are not checked, nor functions decorated in every call to check them: that takes most of the time."""
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda **_: lambda function: function)


@pytest.fixture(scope="module")
def model():
    return retrofitted()


def read(model, ids, cache=None, **options):
    """A cache that has read a text in one go."""
    cache = HippocampalCache() if cache is None else cache
    logits(model, ids, ids.shape[1], cache, **options)
    return cache


def go_on(model, cache, count=CAPACITY + 3, rows=None, seed=77):
    """The logits of a continuation, token by token: in place, once the window is full."""
    rows = cache.layers[0].batch_size if rows is None else rows
    return logits(model, tokens(rows, count, seed=seed), 1, cache)


def tensors(cache):
    """Every tensor of a cache by name, copied."""
    own = {i: tensors_of(layer) for i, layer in enumerate(cache.layers)}
    return {(i, name): u.clone() for i, layer in own.items() for name, u in layer.items()}


def same(cache, before):
    now = tensors(cache)
    return now.keys() == before.keys() and all(torch.equal(u, before[name]) for name, u in now.items())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


# --- copies

COPIES = {
    "clone": lambda cache: cache.clone(),
    "clone to the same device": lambda cache: cache.clone("cpu"),
    "reorder": lambda cache: cache.reorder(torch.arange(2)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_length
def test_copies_of_a_prefix_go_on_alone(model, length, duplicate):
    """Each equals a run of its own, bit for bit, and the prefix stays as it was."""
    ids = tokens(2, length)
    parent = read(model, ids)
    before = tensors(parent)
    for seed in (1, 2):
        fork = duplicate(parent)
        assert type(fork) is HippocampalCache and fork.get_seq_length() == length
        assert torch.equal(go_on(model, fork, seed=seed), go_on(model, read(model, ids), seed=seed))
        assert same(parent, before) and parent.get_seq_length() == length


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral_window", "cohere2"])
def test_copies_in_models_with_windows_of_their_own(name, tmp_path):
    model, ids = retrofitted(name), tokens(2, LONG)
    parent = generate(model, ids, 1, return_dict_in_generate=True).past_key_values
    before = tensors(parent)
    parent.save(tmp_path / "cache")
    expected = logits(model, torch.cat((ids, tokens(2, CAPACITY + 3, seed=77)), dim=1))[:, LONG:]
    for fork in (parent.clone(), HippocampalCache.load(tmp_path / "cache"), copy.deepcopy(parent)):
        assert [type(layer) for layer in fork.layers] == [type(layer) for layer in parent.layers]
        tolerance = FAMILIES[name].tolerance
        torch.testing.assert_close(go_on(model, fork, rows=2), expected, rtol=0, atol=tolerance)
        assert same(parent, before)


def test_a_clone_elsewhere_holds_everything(model):
    cache = read(model, tokens(2, LONG))
    moved = cache.clone("meta")
    assert {u.device.type for u in tensors(moved).values()} == {"meta"}
    assert tensors(moved).keys() == tensors(cache).keys() and moved.get_seq_length() == LONG
    assert {u.device.type for u in tensors(cache).values()} == {"cpu"}


# --- rows

ROWS = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([2])), [2]),
    "masked": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


@pytest.mark.parametrize("change, index", ROWS.values(), ids=ROWS)
@every_length
def test_rows(model, length, change, index):
    ids = tokens(3, length)
    cache, new = read(model, ids), tokens(len(index), CAPACITY + 2, seed=9)
    change(cache)
    assert [layer.batch_size for layer in cache.layers] == [len(index)] * 3
    close(logits(model, new, 1, cache), logits(model, new, 1, read(model, ids[index])))


def test_rows_of_unequal_length_are_reordered(model):
    ids, mask = tokens(3, LONG), torch.ones(3, LONG, dtype=torch.long)
    mask[0, :-1], mask[1, : -CAPACITY - 2] = 0, 0
    cache = read(model, ids, attention_mask=mask, position_ids=positions(mask))
    index = torch.tensor([1, 0, 0])
    new = tokens(3, CAPACITY, seed=4)
    places = mask.sum(dim=1)[index, None] + torch.arange(CAPACITY)
    out = logits(model, new, CAPACITY, cache.reorder(index), position_ids=places)
    for row, source in enumerate(index.tolist()):
        text = ids[source][mask[source].bool()][None]
        close(out[row : row + 1], logits(model, new[row : row + 1], 1, read(model, text)))


def test_a_row_that_does_not_exist_is_an_error(model):
    with pytest.raises(IndexError):
        read(model, tokens(2, LONG)).reorder(torch.tensor([2]))


# --- files


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


def test_layers_that_are_not_ours_may_refuse(tmp_path):
    """Convolutions have states of their own: only a deepcopy takes them along."""
    model, ids = retrofitted("lfm2"), tokens(1, LONG)
    cache = generate(model, ids, 1, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=r"use copy\.deepcopy"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    twin = copy.deepcopy(cache)
    assert torch.equal(go_on(model, twin, rows=1), go_on(model, cache, rows=1))


# --- taking tokens back


def rolled_back(model, ids, count, cache, **options):
    """A cache that recorded its past, read ``count`` more tokens in pieces, and took them back."""
    cache.activate_past_recording()
    read(model, ids, cache, **options)
    cache.crop(0)  # what was read so far will stay
    draft = tokens(len(ids), count, seed=3)
    logits(model, draft, max(1, count // 4), cache)
    cache.crop(-count)
    return cache


@pytest.mark.parametrize("count", [1, 4, LONG])
@every_length
def test_taken_back_is_never_read(model, length, count):
    ids = tokens(2, length)
    cache = rolled_back(model, ids, count, HippocampalCache())
    assert cache.get_seq_length() == length
    fresh = read(model, ids)
    for name, u in tensors(fresh).items():
        close(tensors(cache)[name].double(), u.double())
    close(go_on(model, cache), go_on(model, fresh))


@pytest.mark.parametrize("compressor", [*KINDS, None])
def test_a_part_of_a_draft_is_taken_back(compressor):
    model, cache, text = retrofitted(compressor=compressor), HippocampalCache(), tokens(1, LONG + 20)
    cache.activate_past_recording()
    read(model, text[:, :LONG], cache)
    for start, kept in ((LONG, 3), (LONG + 3, 0), (LONG + 3, 7), (LONG + 10, 10)):
        draft = torch.cat((text[:, start : start + kept], tokens(1, 10 - kept, seed=start)), dim=1)
        expected = logits(model, torch.cat((text[:, :start], draft), dim=1))[:, start:]
        close(logits(model, draft, 10, cache), expected)
        cache.crop(kept - 10)
        assert cache.get_seq_length() == start + kept
    close(go_on(model, cache, rows=1), go_on(model, read(model, text), rows=1))


def test_rows_of_unequal_length_are_taken_back(model):
    ids, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :-3] = 0
    options = {"attention_mask": mask, "position_ids": positions(mask)}
    cache = rolled_back(model, ids, 5, HippocampalCache(), **options)
    close(go_on(model, cache), go_on(model, read(model, ids, **options)))


def test_without_the_memory_too(model):
    ids = tokens(2, LONG)
    with window_only(model):
        cache = rolled_back(model, ids, 5, HippocampalCache())
        close(go_on(model, cache), go_on(model, read(model, ids)))


@pytest.mark.parametrize("name", ["gemma3", "mistral_window", "lfm2"])
def test_layers_of_other_kinds_are_taken_back_alike(name):
    model, ids = retrofitted(name), tokens(1, LONG)

    def fresh():
        cache = generate(model, ids[:, :1], 1, return_dict_in_generate=True).past_key_values
        cache.activate_past_recording()
        logits(model, ids[:, 1:], LONG - 1, cache)
        return cache

    cache, new = fresh(), tokens(1, CAPACITY + 3, seed=77)
    cache.crop(0)
    logits(model, tokens(1, 4, seed=3), 4, cache)
    cache.crop(-4)
    close(logits(model, new, CAPACITY + 3, cache), logits(model, torch.cat((ids, new), dim=1))[:, LONG:])


def test_inside_the_window_nothing_need_be_recorded(model):
    ids, cache = tokens(2, 3), HippocampalCache()
    read(model, torch.cat((ids, tokens(2, CAPACITY - 3, seed=2)), dim=1), cache)
    cache.crop(3 - CAPACITY)
    assert cache.get_seq_length() == 3 and torch.equal(go_on(model, cache), go_on(model, read(model, ids)))
    layer = read(model, ids).layers[0]
    layer.crop(2)
    assert layer.get_seq_length() == 2, "a positive number is the length to keep"


def test_folded_tokens_cannot_be_taken_back(model):
    cache = read(model, tokens(2, CAPACITY + 1))
    before = tensors(cache)
    with pytest.raises(RuntimeError, match=r"0 tokens are recorded.*activate_past_recording"):
        cache.crop(-1)
    assert same(cache, before)
    cache.crop(0)
    assert same(cache, before)
    cache.activate_past_recording()
    logits(model, tokens(2, 4), 4, cache)
    before = tensors(cache)
    with pytest.raises(RuntimeError, match="4 tokens are recorded"):
        cache.crop(-5)
    assert same(cache, before)
    cache.crop(-4)


def test_what_is_recorded_is_bounded(model):
    ids, cache = tokens(1, 3 * MAX_ROLLBACK), HippocampalCache()
    cache.activate_past_recording()
    expected = logits(model, ids, ids.shape[1], cache)
    close(expected, logits(model, ids))
    assert len(cache.layers[0].recording) <= 2 * MAX_ROLLBACK
    for token in tokens(1, MAX_ROLLBACK + 10, seed=1).split(1, dim=1):
        logits(model, token, 1, cache)
    assert len(cache.layers[0].recording) == MAX_ROLLBACK
    cache.crop(-MAX_ROLLBACK)
    text = torch.cat((ids, tokens(1, MAX_ROLLBACK + 10, seed=1)[:, :10]), dim=1)
    close(go_on(model, cache, rows=1), go_on(model, read(model, text), rows=1))


# --- static caches


def static(model, ids):
    return generate(model, ids, 1, cache_implementation="static", return_dict_in_generate=True).past_key_values


def test_static_caches_are_not_cropped(model):
    for cache in (static(model, tokens(2, 3)), static(model, tokens(2, LONG))):
        before = tensors(cache)
        with pytest.raises(RuntimeError, match="static"):
            cache.crop(-1)
        assert same(cache, before)


@pytest.mark.parametrize("length", [3, LONG])
def test_static_caches_are_copied_as_dynamic_ones(model, length, tmp_path):
    ids = tokens(2, length)
    cache, expected = static(model, ids), go_on(model, read(model, ids))
    assert [type(layer) for layer in cache.layers] == [StaticMemoryLayer] * 3
    cache.save(tmp_path / "cache")
    for fork in (cache.clone(), HippocampalCache.load(tmp_path / "cache")):
        assert [type(layer) for layer in fork.layers] == [MemoryLayer] * 3 and fork.get_seq_length() == length
        close(go_on(model, fork), expected)
    close(go_on(model, cache, rows=2), expected)


def test_static_caches_keep_their_addresses_and_can_be_reset(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    expected = go_on(model, cache, rows=2)
    addresses = {name: u.data_ptr() for layer in cache.layers for name, u in layer.state.tensors().items()}
    full = tensors(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and not any(u.any() for u in tensors(cache).values())
    assert torch.equal(go_on(model, cache, rows=2), expected) and same(cache, full)
    assert {n: u.data_ptr() for layer in cache.layers for n, u in layer.state.tensors().items()} == addresses


def test_a_cache_that_was_reset_is_new(model):
    cache = read(model, tokens(2, LONG))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(go_on(model, cache, rows=3), go_on(model, HippocampalCache(), rows=3))


# --- one mode each

MODES = {"memory": None, "window": window_only, "full": full_attention}
PAIRS = [(one, other) for one in MODES for other in MODES if one != other]


def in_mode(mode, model, function):
    if MODES[mode] is None:
        return function()
    with MODES[mode](model):
        return function()


@pytest.mark.parametrize("length", [3, LONG])
@pytest.mark.parametrize("first, second", PAIRS)
def test_a_cache_keeps_to_the_mode_it_began_in(model, first, second, length):
    ids = tokens(2, length)
    cache = in_mode(first, model, lambda: read(model, ids))
    before = tensors(cache)
    for wrong in (
        lambda: go_on(model, cache, rows=2),
        lambda: generate(model, tokens(2, LONG + 9), cache=cache),
    ):
        with pytest.raises(ValueError, match=r"full attention|long-term memory"):
            in_mode(second, model, wrong)
        assert same(cache, before) and cache.get_seq_length() == length
    got, expected = (
        in_mode(first, model, lambda c=c: go_on(model, c, rows=2))
        for c in (cache, in_mode(first, model, lambda: read(model, ids)))
    )
    assert torch.equal(got, expected)


def test_a_restored_model_does_not_take_the_cache():
    model = retrofitted()
    cache = read(model, tokens(2, LONG))
    before = tensors(cache)
    restore(model)
    with pytest.raises(ValueError, match="Begin a new cache inside full_attention"):
        go_on(model, cache)
    assert same(cache, before)


OTHERS = {
    "window": (lambda: retrofitted(window_size=7), 2, "the state belongs to"),
    "dtype": (lambda: retrofitted(dtype=torch.float32), 2, "another dtype"),
    "compressor": (lambda: retrofitted(compressor=Mamba2), 2, "another compressor or adapter"),
    "heads": (lambda: retrofitted(model=base(num_key_value_heads=4)), 2, "another layer or model"),
    "rows": (retrofitted, 3, "2 rows, the tokens have 3"),
}


@pytest.mark.parametrize("make, rows, message", OTHERS.values(), ids=OTHERS)
def test_a_cache_that_does_not_fit_is_refused_and_unchanged(model, make, rows, message, unchecked):
    cache = read(model, tokens(2, LONG))
    before = tensors(cache)
    with pytest.raises(ValueError, match=message):
        go_on(make(), cache, rows=rows)
    assert same(cache, before)


# --- what it says of itself


def test_length_counts_every_column(model):
    cache = HippocampalCache()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, :7] = 0
    read(model, tokens(2, LONG), cache, attention_mask=mask, position_ids=positions(mask))
    assert cache.get_seq_length() == LONG, "padding included"
    assert cache.layers[0].state.seen.tolist() == [LONG - 7, LONG]
    assert cache.layers[0].get_mask_sizes(5) == (LONG + 5, 0) and cache.layers[0].get_max_length() == -1


def test_an_empty_cache_is_a_cache(model, tmp_path):
    HippocampalCache().save(tmp_path / "cache")
    for cache in (HippocampalCache().clone(), HippocampalCache.load(tmp_path / "cache"), HippocampalCache()):
        cache.reorder_cache(torch.tensor([0]))
        assert torch.equal(go_on(model, cache, rows=2), go_on(model, HippocampalCache(), rows=2))


@pytest.mark.parametrize("compressor", [*KINDS, None])
def test_bytes_are_constant_once_the_window_is_full(compressor):
    model, cache = retrofitted(compressor=compressor), HippocampalCache()
    sizes, stored = [], []
    for cut in (CAPACITY - 1, 1, 1, 100, 1, 57):
        logits(model, tokens(2, cut), cut, cache)
        sizes.append(cache.nbytes)
        file = io.BytesIO()
        torch.save(cache, file)
        stored.append(file.tell())
    assert sizes[0] < sizes[1] and len(set(sizes[1:])) == 1
    assert max(stored[1:]) - min(stored[1:]) < 256, "nothing else grows"
    assert sizes[-1] == sum(u.numel() * u.element_size() for u in tensors(cache).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compressor", [*KINDS, None])
def test_the_report_says_the_bytes_of_the_cache(compressor, dtype):
    model = retrofitted(dtype=dtype, compressor=compressor)
    rows = re.findall(r"^(total|model\S+) .* ([\d,]+)$", memory_report(model), re.MULTILINE)
    said = [int(number.replace(",", "")) for _, number in rows]
    for batch in (1, 3):
        cache = read(model, tokens(batch, LONG))
        assert [batch * number for number in said] == [*(layer.nbytes for layer in cache.layers), cache.nbytes]
