"""States and their files: a value that can be forked, moved, reordered, saved and resumed bit for bit."""

import json
import re
import struct

import pytest
import torch

from ahn_layers import GatedDeltaNet, Mamba2, MemoryState, MemoryStore, SalientSlots, Window
from ahn_layers.files import write_atomically


@pytest.fixture(params=[GatedDeltaNet, Mamba2, None])
def filled(request):
    """A store, a state in the middle of a text, and the tokens that follow."""
    memory = None if request.param is None else request.param(10, 4, 8, num_kv_heads=2)
    if memory is not None:
        torch.nn.init.normal_(memory.o_proj.weight)
    store = MemoryStore(Window(5, num_sinks=2), memory)
    tokens = [torch.randn(3, h, 20, 8) for h in (4, 2, 2)] + [torch.randn(3, 20, 10)]
    with torch.no_grad():
        _, state = store(*(u[..., :13, :] for u in tokens))
    return store, state, [u[..., 13:, :] for u in tokens]


def test_saved_and_resumed_bit_for_bit(filled, tmp_path):
    store, state, tokens = filled
    state.save(tmp_path / "state.safetensors")
    loaded = MemoryState.load(tmp_path / "state.safetensors")
    assert loaded.description() == state.description()
    with torch.no_grad():
        expected, end = store(*tokens, state)
        out, resumed = store(*tokens, loaded)
    assert torch.equal(out, expected)
    assert all(torch.equal(u, end.tensors()[name]) for name, u in resumed.tensors().items())
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_file_knows_the_weights_that_made_it(filled, tmp_path):
    store, state, _ = filled
    path = tmp_path / "state.safetensors"
    state.save(path, store)
    assert MemoryState.load(path, store=store).length == state.length
    if store.compressor is None:
        return
    with torch.no_grad():
        store.compressor.o_proj.weight[0, 0, 0] += 1
    with pytest.raises(ValueError, match="was made with other weights"):
        MemoryState.load(path, store=store)
    state.save(path)  # nobody said by what
    assert MemoryState.load(path, store=store).length == state.length


def test_a_file_knows_the_options_that_made_it(tmp_path):
    """Those that no weight shows."""
    path, (q, k, v) = tmp_path / "state.safetensors", torch.randn(3, 1, 2, 20, 8)
    store, other = (MemoryStore(Window(4), eviction=SalientSlots(3, score=u)) for u in ("key_norm", "value_norm"))
    store(q, k, v)[1].save(path, store)
    assert MemoryState.load(path, store=store).length == 20
    with pytest.raises(ValueError, match=r"the state was made by .*key_norm.*, this store is .*value_norm"):
        MemoryState.load(path, store=other)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_resumed_in_place(filled, count, tmp_path):
    """A file has the gates in another order than the compressor."""
    store, state, tokens = filled
    state.save(tmp_path / "state.safetensors")
    loaded = MemoryState.load(tmp_path / "state.safetensors")
    loaded.inplace = True
    with torch.no_grad():
        for start in range(0, 7, count):
            part = [u[..., start : start + count, :] for u in tokens]
            expected, state = store(*part, state)
            out, loaded = store(*part, loaded)
            torch.testing.assert_close(out, expected)
    for name, u in loaded.tensors().items():
        torch.testing.assert_close(u, state.tensors()[name])


def test_copies_are_not_overwritten(filled):
    _, state, _ = filled
    state.inplace = True
    copies = [state.clone(), state.to("cpu"), state.reorder(torch.arange(state.batch_size))]
    assert not any(copied.inplace for copied in copies)


def test_rows_reordered_repeated_and_dropped(filled):
    store, state, tokens = filled
    index = torch.tensor([2, 0, 0])
    with torch.no_grad():
        expected, _ = store(*tokens, state)
        out, _ = store(*(u[index] for u in tokens), state.reorder(index))
        one, _ = store(*(u[1:2] for u in tokens), state.reorder(torch.tensor([1])))
    torch.testing.assert_close(out, expected[index])
    torch.testing.assert_close(one, expected[1:2])
    with pytest.raises(IndexError):
        state.reorder(torch.tensor([3]))


def test_clone_shares_nothing_and_to_moves_everything(filled):
    _, state, _ = filled
    copy = state.clone()
    for name, u in copy.tensors().items():
        assert u.data_ptr() != state.tensors()[name].data_ptr() or u.numel() == 0
    assert all(u.device.type == "meta" for u in state.to("meta").tensors().values())
    assert copy.nbytes == state.nbytes


def test_a_state_moved_to_where_it_is_shares_nothing(filled):
    store, state, tokens = filled
    moved, before = state.to("cpu"), state.clone()
    state.inplace = True
    with torch.no_grad():
        store(*(u[..., :1, :] for u in tokens), state)
    assert all(torch.equal(u, before.tensors()[name]) for name, u in moved.tensors().items())


def test_a_dtype_is_no_place_for_a_state(filled, tmp_path, unchecked):
    with pytest.raises(TypeError, match=r"device=torch\.bfloat16: expected a device.*computed anew"):
        filled[1].to(torch.bfloat16)
    filled[1].save(tmp_path / "state")
    for place, error in ((torch.bfloat16, TypeError), ("nowhere", RuntimeError)):
        with pytest.raises(error, match=r"[Ee]xpected .*device"):  # and not that the file is damaged
            MemoryState.load(tmp_path / "state", place)


def test_values_of_other_rows_or_another_window_are_not_taken_over(filled):
    store, state, tokens = filled
    before = state.clone()
    with torch.no_grad():
        _, other = MemoryStore(Window(6, num_sinks=1), store.compressor)(*tokens)
    for wrong, part in ((state.reorder(torch.tensor([1])), "(1, "), (other, "window_size=6")):
        with pytest.raises(ValueError, match=re.escape(part)):
            state.copy_(wrong)
    assert all(torch.equal(u, before.tensors()[name]) for name, u in state.tensors().items())


def corrupt_header(data):
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    return header, data[8 + size :]


def with_metadata(data, **changes):
    header, rest = corrupt_header(data)
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


DAMAGE = {
    "truncated": (lambda data: data[: len(data) // 2], "damaged or truncated"),
    "empty": (lambda data: b"", "damaged or truncated"),
    "garbage": (lambda data: b"\xff" * len(data), "damaged or truncated"),
    "another kind": (
        lambda data: with_metadata(data, format="pt"),
        "expected a file of format 'ahn_layers.memory_state'",
    ),
    "another version": (lambda data: with_metadata(data, version="99"), "format version 99, this library reads 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(damage, filled, tmp_path):
    spoil, message = DAMAGE[damage]
    path = tmp_path / "state.safetensors"
    filled[1].save(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        MemoryState.load(path)
    assert "state.safetensors" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        MemoryState.load(tmp_path / "nothing.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_state_is_printed_in_one_line_and_its_rows_are_chosen_by_any_numbers(filled):
    _, state, _ = filled
    assert repr(state) == f"MemoryState(3 rows, length=13, {state.window})"
    chosen = state.reorder([2, 0, 2])
    assert all(torch.equal(u, state.tensors()[name][[2, 0, 2]]) for name, u in chosen.tensors().items())
    with pytest.raises(AttributeError, match="'MemoryState' object has no attribute 'detach'"):
        state.detach()
