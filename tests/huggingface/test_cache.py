"""The cache of a retrofitted model is a value: forked, reordered, moved, saved, rolled back, and never mixed up."""

# ruff: noqa: F811 - fixtures are imported

import copy
import io
import pickle
import re

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ahn_layers import HippocampalCache, Mamba2, full_attention, memory_report, restore, window_only
from ahn_layers.huggingface.cache import memory_layer
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.static_layer import StaticMemoryLayer

from ..methods import KINDS
from ..models import CAPACITY, FAMILIES, base, generate, logits, positions, retrofitted, tokens
from .caching import LONG, close, every_length, fast, go_on, model, read, same, tensors  # noqa: F401 - fixtures

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


def static(model, ids):
    return generate(model, ids, 1, cache_implementation="static", return_dict_in_generate=True).past_key_values


def test_static_caches_are_not_cropped(model):
    for cache in (static(model, tokens(2, 3)), static(model, tokens(2, LONG))):
        before = tensors(cache)
        with pytest.raises(RuntimeError, match="static"):
            cache.crop(-1)
        assert same(cache, before)


@pytest.mark.parametrize("change", [ROWS["selected"][0], ROWS["repeated"][0]], ids=["selected", "repeated"])
def test_static_caches_keep_their_number_of_rows(model, change):
    cache = HippocampalCache.of(static(model, tokens(3, LONG)))
    before = tensors(cache)
    with pytest.raises(ValueError, match=r"keep their number: make a dynamic one with cache.clone\(\)"):
        change(cache)
    assert same(cache, before)
    change(cache.clone())


def test_a_dtype_is_no_place_for_a_cache(model, unchecked):
    with pytest.raises(TypeError, match=r"device=torch\.bfloat16: expected a device"):
        read(model, tokens(1, 3)).clone(torch.bfloat16)


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


@pytest.mark.parametrize("first, length", [(DynamicLayer(), None), (StaticLayer(20), 20)], ids=["growing", "fixed"])
def test_layers_that_share_keys_need_none_in_the_base_models_cache(first, length, monkeypatch):
    """As with transformers 5.17, whose caches end before them."""
    monkeypatch.setattr("ahn_layers.huggingface.cache.SHARING", ())
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [first], None
    ours = [memory_layer(cache, index) for index in (4, 2)]
    assert ours == [cache.layers[4], cache.layers[2]] and len(cache.layers) == 5
    assert all(getattr(layer, "max_cache_len", None) == length for layer in ours)
    assert all(isinstance(layer, StaticMemoryLayer) == (length is not None) for layer in ours)
