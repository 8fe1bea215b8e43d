"""Each script of hard use, small; and the faults that they have found."""

import copy
import json

import pytest
import torch
from transformers import StaticCache

from ahn_layers import GatedDeltaNet, HippocampalCache, MemoryState, MemoryStore, SalientSlots, Window
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.ops.attention.window_attention import masked_attention

from ..models import positions, retrofitted, tokens
from . import exhausted, mutations, properties, rotations, saving, serving, streaming
from .stores import Interrupt

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize(
    "kind, cases", [("stores", 40), ("rounding", 15), ("caches", 15), ("generate", 4), ("packed", 5)]
)
def test_properties(kind, cases):
    assert properties.run(kind, cases, number=1) >= cases


@pytest.mark.parametrize("kind, files", [("state", 150), ("cache", 120), ("adapter", 40)])
def test_damaged_files(kind, files):
    found = mutations.try_files(kind, files, 7, print)
    assert sum(found.values()) == files and not [verdict for verdict in found if verdict.startswith("FAULT")]


def test_threads_that_generate_at_once():
    assert serving.try_threads(threads=5, each=1) == 5


def test_generations_leave_nothing_behind():
    blocks, tensors, _ = serving.try_generations(16)
    assert tensors <= 0 and blocks < 2000


@pytest.mark.parametrize("kind", saving.KINDS)
def test_killed_while_saving(kind):
    assert saving.try_kills(kind, 3)["earlier"] >= 0


@pytest.mark.parametrize("kind", ["state", "adapter"])
def test_a_full_disk(kind):
    assert 0 < saving.try_full_disk(kind) < 7


def test_memory_runs_out_in_a_prefill():
    assert len(exhausted.try_failures(16)) == len(exhausted.CASES)


def test_a_stream():
    torch.manual_seed(0)
    model = retrofitted(dtype=torch.float32, eviction=SalientSlots(3))
    losses, sizes, _ = streaming.stream(model, tokens(1, 1500)[0], passes=3, piece=500)
    assert len(sizes) == 1 and streaming.drift(losses) < 0.05


def test_rotations_are_turned_back_exactly_at_a_million_positions():
    row = rotations.errors(1_000_000, 10_000.0)
    assert row["the library turns back"] < 1e-6 and row["contents of the memory"] < 0.03


# --- what was found


def test_values_may_be_much_larger_than_keys():
    """Queries that face the sinks otherwise make keys longer, not values shorter."""
    q, k, v = torch.randn(1, 2, 3, 2), torch.randn(1, 2, 5, 2), torch.randn(1, 2, 5, 9)
    same = masked_attention(q, k, v, None, q_sinks=q, num_sinks=2)
    torch.testing.assert_close(same, masked_attention(q, k, v, None))


def test_real_tokens_after_padding_are_not_taken_for_padding():
    """Though the call that brings them has no padding at all: a crop takes back the right ones."""
    model, ids, cache = retrofitted(), tokens(1, 6), HippocampalCache()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        for a, b in ((0, 3), (3, 6)):
            at = positions(mask[:, :b])[:, a:]
            model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at, **{CACHE: cache})
        assert cache.layers[0].padding.real(6).tolist() == mask.bool().tolist()
        cache.crop(-2)
        assert cache.layers[0].state.seen.tolist() == [3]
        found = model(ids[:, 4:5], position_ids=torch.tensor([[3]]), **{CACHE: cache}).logits
        expected = model(ids[:, [0, 1, 3, 4]], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("held", [3, 30])
def test_an_error_after_the_last_layer_takes_the_tokens_back(held):
    """Where that is impossible, the cache says so."""
    model, cache, new = retrofitted(), HippocampalCache(), tokens(1, 2, seed=1)
    with torch.no_grad():
        model(tokens(1, held), **{CACHE: cache})
        before = cache.clone()
        hook = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            model(new, **{CACHE: cache})
        hook.remove()
        if held == 3:
            assert cache.get_seq_length() == 3
            assert torch.equal(model(new, **{CACHE: cache}).logits, model(new, **{CACHE: before}).logits)
            return
        for use in (
            cache.clone,
            lambda: cache.save("nowhere"),
            lambda: cache.crop(-1),
            lambda: model(new, **{CACHE: cache}),
        ):
            with pytest.raises(RuntimeError, match="this cache is unusable"):
                use()


@pytest.mark.parametrize("make", [HippocampalCache, lambda: StaticCache(retrofitted().config, 64)])
def test_an_error_after_a_token_was_overwritten_is_noticed(make):
    """Whatever the operation that fails, in every layer: no answer is wrong."""
    model, new, cache = retrofitted(), tokens(1, 1, seed=1), make()
    with torch.no_grad():
        model(tokens(1, 30), **{CACHE: cache})
        expected = model(new, **{CACHE: copy.deepcopy(cache)}).logits
        for operation in range(0, 400, 7):
            tried = copy.deepcopy(cache)
            try:
                with Interrupt(operation, torch.OutOfMemoryError()):
                    model(new, **{CACHE: tried})
                break
            except torch.OutOfMemoryError:
                pass
            try:
                assert torch.equal(model(new, **{CACHE: tried}).logits, expected)
            except RuntimeError as error:
                assert "this cache is unusable" in str(error)  # noqa: PT017
        assert operation > 100


def test_the_length_of_an_interrupted_cache_is_that_before_the_call():
    model, cache = retrofitted(), HippocampalCache()
    with torch.no_grad():
        model(tokens(1, 3), **{CACHE: cache})
        hook = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model(tokens(1, 2), **{CACHE: cache})
        hook.remove()
    assert cache.get_seq_length() == 3


def rewritten(path, **changes):
    """The description in a file, forged with a right hash."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    known = json.loads(header["__metadata__"]["description"])
    header["__metadata__"]["description"] = json.dumps(known | changes)
    text = json.dumps(header).encode()
    path.write_bytes(mutations.forged(len(text).to_bytes(8, "little") + text + data[8 + size :]))


@pytest.mark.parametrize("changes, message", [
    ({"length": 5}, "length 5"), ({"length": 10**30}, "length"), ({"padded": 1}, "padded 1"),
    ({"window": {"window_size": 1, "num_sinks": 0}}, "slots 7, expected 1 to 1"),
    ({"window": {"window_size": 10**12, "num_sinks": 2}}, "slots 7, expected 20"),
    ({"window": [5]}, "damaged"), ({"window": {"window_size": -1}}, "window_size=-1"),
])  # fmt: skip
def test_a_state_whose_parts_do_not_fit_is_refused(changes, message, tmp_path):
    path, store = tmp_path / "state", MemoryStore(Window(5, 2), GatedDeltaNet(8, 2, 8))
    store(*torch.randn(3, 2, 2, 20, 8), torch.randn(2, 20, 8))[1].save(path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        MemoryState.load(path)
    assert str(path) in str(error.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    path, store = tmp_path / "state", MemoryStore(Window(5, 2), GatedDeltaNet(8, 2, 8))
    store(*torch.randn(3, 2, 2, 20, 8), torch.randn(2, 20, 8))[1].save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="contents are not what was written"):
        MemoryState.load(path)


def test_a_memory_of_another_shape_is_refused():
    store = MemoryStore(Window(5, 2), GatedDeltaNet(8, 2, 8))
    _, state = store(*torch.randn(3, 2, 2, 20, 8), torch.randn(2, 20, 8))
    state.memory = state.memory[:, :1]
    with pytest.raises(ValueError, match="made by another compressor"):
        store(*torch.randn(3, 2, 2, 1, 8), torch.randn(2, 1, 8), state)
