"""Rows of caches join and leave: each goes on as it would alone, whatever its length and its neighbours."""

import pytest
import torch
from transformers import StaticCache

from ahn_layers import HippocampalCache, SalientSlots, full_attention, retrofit
from ahn_layers.huggingface import rows as rows_module
from ahn_layers.huggingface.layer_values import tensors_of
from ahn_layers.huggingface.padding import Padding, Row

from ..families.cases import build
from ..methods import COMPRESSORS
from ..models import CAPACITY, FAMILIES, generate, logits, retrofitted, tokens

LENGTHS = (1, CAPACITY - 2, CAPACITY, 3 * CAPACITY + 1)
COUNT = CAPACITY + 3
"""Tokens that rows go on by: enough for every window to lose some."""
ALIGNED = {"growing": None, "fixed": len(LENGTHS)}
MEMORIES = [(compressor, None) for compressor in COMPRESSORS]
MEMORIES += [(COMPRESSORS[2], SalientSlots(3, score="value_norm", rate=0.1)), (COMPRESSORS[3], SalientSlots(5))]
pytestmark = pytest.mark.usefixtures("unchecked")

aligned = pytest.mark.parametrize("size", ALIGNED.values(), ids=ALIGNED)


@pytest.fixture(scope="module")
def model():
    return retrofitted()


def read(model, *lengths, **options):
    """A cache for each length, that has read a text of its own."""
    caches = []
    for i, length in enumerate(lengths):
        cache = HippocampalCache()
        logits(model, tokens(1, length, seed=i), length, cache, **options)
        caches.append(cache)
    return caches


def new(i, count=COUNT):
    return tokens(1, count, seed=100 + i)


def alone(model, i, length, cuts=1, count=COUNT):
    """What the row of this number goes on with by itself."""
    return logits(model, new(i, count), cuts, read(model, *LENGTHS[:i], length)[i])


def go_on(model, cache, which, cuts=1, count=COUNT):
    """The logits of a batch that goes on, row by row with the tokens of these numbers."""
    return logits(model, torch.cat([new(i, count) for i in which]), cuts, cache)


def same(cache, other):
    for mine, its in zip(cache.layers, other.layers, strict=True):
        a, b = tensors_of(mine), tensors_of(its)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert mine.get_seq_length() == its.get_seq_length()
    return True


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cuts", [1, 4], ids=["by token", "in pieces"])
@aligned
def test_joined_rows_go_on_as_alone(model, size, cuts):
    joined = HippocampalCache.join(read(model, *LENGTHS), rows=size)
    assert joined.get_seq_length() == max(LENGTHS)
    together = go_on(model, joined, range(len(LENGTHS)), cuts)
    for i, length in enumerate(LENGTHS):
        close(together[i], alone(model, i, length, cuts)[0])


@pytest.mark.parametrize("compressor, eviction", MEMORIES, ids=lambda u: getattr(u, "__name__", str(u)))
def test_with_every_memory(compressor, eviction):
    model = retrofitted(compressor=compressor, eviction=eviction)
    joined = HippocampalCache.join(read(model, *LENGTHS), rows=len(LENGTHS))
    together = go_on(model, joined, range(len(LENGTHS)))
    for i in (1, 3):
        close(together[i], alone(model, i, LENGTHS[i])[0])


@pytest.mark.parametrize("name", ["gemma2", "mistral_window", "gpt2"])
def test_in_other_families(name):
    """Also where other layers hold keys and values of their own, and where positions are learned."""
    model, lengths = retrofitted(name), (3, CAPACITY + 4, 3 * CAPACITY)
    joined = HippocampalCache.join(read(model, *lengths))
    together = go_on(model, joined, range(3))
    for i, length in enumerate(lengths):
        expected = logits(model, new(i), 1, read(model, *lengths)[i])
        close(together[i], expected[0], FAMILIES[name].tolerance)
        taken = joined.take(i)
        assert taken.get_seq_length() == length + COUNT
        expected = logits(model, torch.cat((new(i), new(7)), dim=1), 1, read(model, *lengths)[i])[:, COUNT:]
        close(logits(model, new(7), 1, taken), expected, FAMILIES[name].tolerance)


@aligned
def test_taken_rows_are_what_was_joined(model, size):
    """Bit for bit, in any order."""
    caches = read(model, *LENGTHS)
    joined = HippocampalCache.join(caches, rows=size)
    for i, cache in enumerate(caches):
        assert same(joined.take(i), cache)
    two = joined.take([3, 0])
    assert two.get_seq_length() == LENGTHS[3] and two.layers[0].batch_size == 2
    assert same(two.take(1), caches[0]) and same(two.take([0]), caches[3])
    before = [cache.clone() for cache in caches]
    go_on(model, two, (3, 0))
    go_on(model, joined, range(4))
    assert all(same(cache, copy) for cache, copy in zip(caches, before, strict=True))


@pytest.mark.parametrize("length", LENGTHS)
@aligned
def test_a_row_is_replaced(model, size, length):
    """The new row goes on as alone; the others as if nothing had happened: in every bit, where addresses are fixed."""
    caches = read(model, *LENGTHS)
    cache, untouched = (HippocampalCache.join(caches, rows=size) for _ in range(2))
    go_on(model, cache, range(4), count=3), go_on(model, untouched, range(4), count=3)
    addresses = [u.data_ptr() for layer in cache.layers for u in tensors_of(layer).values()]
    text = tokens(1, length, seed=50)
    newcomer = HippocampalCache()
    logits(model, text, length, newcomer)
    cache.put(2, newcomer)
    if size is not None:
        assert addresses == [u.data_ptr() for layer in cache.layers for u in tensors_of(layer).values()]
    more = torch.cat([tokens(1, COUNT, seed=60 + i) for i in range(4)])
    found, expected = logits(model, more, 1, cache), logits(model, more, 1, untouched)
    close(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert size is None or torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])
    close(found[2:3], logits(model, torch.cat((text, more[2:3]), dim=1), length)[:, length:], 1e-9)
    expected = HippocampalCache()
    logits(model, torch.cat((text, more[2:3]), dim=1), [length, *[1] * COUNT], expected)
    taken = cache.take(2)
    assert taken.get_seq_length() == expected.get_seq_length() == length + COUNT
    for mine, its in zip(taken.layers, expected.layers, strict=True):
        for (name, u), (_, v) in zip(tensors_of(mine).items(), tensors_of(its).items(), strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=1e-9, msg=name)


def test_the_cache_is_as_long_as_its_longest_row(model):
    caches = read(model, *LENGTHS)
    cache = HippocampalCache.join(caches, rows=4)
    assert cache.joined
    cache.put([3, 1], HippocampalCache.join([caches[0], caches[0]]))
    assert cache.get_seq_length() == CAPACITY
    cache.put(2, caches[0])
    assert cache.get_seq_length() == 1 and not cache.joined
    close(go_on(model, cache, [0] * 4)[3:], alone(model, 0, 1))


def test_rows_beyond_are_copies(model):
    caches = read(model, *LENGTHS[:2])
    joined = HippocampalCache.join(caches, rows=5)
    assert joined.layers[0].batch_size == 5
    assert all(same(joined.take(row), caches[1]) for row in (1, 2, 3, 4))


@pytest.mark.parametrize("size", [None, 2], ids=["growing", "fixed"])
def test_generate_on_joined_rows(model, size):
    """With the usual mask of a batch that is padded on the left."""
    caches, lengths = read(model, 5, 2 * CAPACITY), (5, 2 * CAPACITY)
    joined = HippocampalCache.join(caches, rows=size)
    ids = torch.zeros(2, lengths[1] + 2, dtype=torch.long)
    mask = torch.zeros_like(ids)
    expected = []
    for i, length in enumerate(lengths):
        text = torch.cat((tokens(1, length, seed=i), new(i, 2)), dim=1)
        ids[i, -length - 2 :], mask[i, -length - 2 :] = text, 1
        expected.append(generate(model, text, COUNT, cache=caches[i])[0, -COUNT:])
    out = generate(model, ids, COUNT, cache=joined, attention_mask=mask)
    assert torch.equal(out[:, -COUNT:], torch.stack(expected))
    longer = torch.cat((out, tokens(2, 1)), dim=1)
    for mask in (None, torch.ones_like(longer)):
        with pytest.raises(ValueError, match="rows of the cache have different lengths"):
            generate(model, longer.clamp(min=1), 1, cache=joined, attention_mask=mask)


def test_padded_rows_join(model):
    """Rows that were padded when they were read, on the left and in the middle."""
    ids = tokens(2, 3 * CAPACITY)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 7:9] = 0, 0
    padded = HippocampalCache()
    logits(model, ids, ids.shape[1], padded, attention_mask=mask)
    (short,) = read(model, 4)
    joined = HippocampalCache.join([padded, short])
    for row in range(2):
        assert same(joined.take(row), padded.take(row))
    more = tokens(3, COUNT, seed=9)
    found = logits(model, more, 1, joined)
    close(found[:2], logits(model, more[:2], 1, padded))
    close(found[2:], logits(model, more[2:], 1, short))


def test_joined_rows_are_a_value(model, tmp_path):
    """Copied, saved, reordered and cropped as any cache."""
    caches = read(model, 3, CAPACITY - 2)
    joined = HippocampalCache.join(caches)
    joined.save(tmp_path / "joined")
    expected = go_on(model, joined.clone(), (0, 1))
    assert torch.equal(go_on(model, HippocampalCache.load(tmp_path / "joined"), (0, 1)), expected)
    close(go_on(model, joined.reorder(torch.tensor([1, 0])), (1, 0)), expected[[1, 0]])
    go_on(model, joined, (0, 1), count=2)
    joined.crop(-2)
    close(go_on(model, joined, (0, 1)), expected)
    joined = HippocampalCache.join(read(model, *LENGTHS), rows=4)
    joined.save(tmp_path / "fixed")
    close(go_on(model, HippocampalCache.load(tmp_path / "fixed"), range(4)), go_on(model, joined, range(4)))


def test_static_caches_of_transformers_take_rows(model):
    cache = StaticCache(model.config, 64)
    logits(model, tokens(2, CAPACITY + 2), CAPACITY + 2, cache)
    ours = HippocampalCache.of(cache)
    (short,) = read(model, 3)
    ours.put(1, short)
    more = tokens(2, COUNT, seed=5)
    close(logits(model, more, 1, ours)[1:], logits(model, more[1:], 1, short))


def test_padding_of_aligned_rows():
    rows = [Row(9, ()), Row(4, ()), Row(4, (0, 2)), Row(5, (2, 3)), Row(3, (0,)), Row(9, (1,))]
    padding = Padding.aligned(rows)
    assert padding.rows(9) == rows
    real = padding.real(9).int().tolist()
    assert real[1] == [0] * 5 + [1] * 4 and real[2] == [0] * 7 + [1] * 2 and real[3] == [0] * 4 + [1, 1, 0, 1, 1]
    assert padding.reorder([4, 1]).rows(9) == [rows[4], rows[1]]
    assert Padding.aligned(rows[:1]) is None and Padding.aligned([rows[3]]) == Padding(((2, 3),))


# --- what does not fit


def refused(match, change, error=ValueError):
    with pytest.raises(error, match=match):
        change()


def test_what_does_not_fit(model):
    cache, other = HippocampalCache.join(read(model, *LENGTHS)), read(model, 5)[0]
    before = cache.clone()
    unlike = {
        "window": retrofitted(window_size=5),
        "memory weights": retrofitted(compressor=COMPRESSORS[0]),
        "memory weights|dtype": retrofitted(dtype=torch.float32),
        "layer 1 is a MemoryLayer in one cache and a DynamicLayer": retrofitted(layers=[0, 2]),
        "evictions|weights": retrofitted(eviction=SalientSlots(2)),
        "evictions|sizes|holds|hold": retrofitted(compressor=None),
    }
    for match, stranger in unlike.items():
        (theirs,) = read(stranger, 5)
        refused(match, lambda theirs=theirs: cache.put(0, theirs))
        refused(match, lambda theirs=theirs: HippocampalCache.join([cache, theirs]))
    refused("holds no tokens", lambda: cache.put(0, HippocampalCache()))
    refused("no caches to join", lambda: HippocampalCache.join([]))
    refused("expected 1 different rows", lambda: cache.put([0, 1], other))
    refused("expected 2 different rows", lambda: cache.put([1, 1], HippocampalCache.join([other, other])))
    refused("the cache has 4 rows", lambda: cache.put(4, other), IndexError)
    refused("the cache has 4 rows", lambda: cache.take([-1]), IndexError)
    refused("rows is empty", lambda: cache.take([]))
    refused("rows=3: the caches have 4 rows", lambda: HippocampalCache.join([cache], rows=3))
    refused("never empty", lambda: HippocampalCache.join([other], rows=2).layers[0].reset(), RuntimeError)
    assert same(cache, before)
    partly = read(retrofitted(layers=[0, 2]), 5)
    refused("are not retrofitted", lambda: HippocampalCache.join(partly, rows=2))
    with full_attention(model):
        plain = HippocampalCache()
        logits(model, tokens(1, 3), 3, plain)
    refused("holds no tokens of a retrofitted model", lambda: cache.put(0, plain))


def test_an_interrupted_put_is_noticed(model, monkeypatch):
    cache, other = HippocampalCache.join(read(model, *LENGTHS)), read(model, 5)[0]
    calls = []

    def put(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(rows_module, "put_rows", put)
    with pytest.raises(KeyboardInterrupt):
        cache.put(0, other)
    refused("this cache is unusable", lambda: go_on(model, cache, range(4)), RuntimeError)


def test_rows_of_a_layer_that_holds_keys_and_a_recurrence_are_refused():
    """They would go on without it."""
    model = retrofitted("falcon_h1", layers=[0, 2])
    one, two = read(model, 5, 9)
    for act in (lambda: one.take(0), lambda: HippocampalCache.join([one, two]), lambda: one.put(0, two)):
        refused("LinearAttentionAndFullAttentionLayer cannot be taken out, put in or joined", act)


@pytest.mark.parametrize("name", ["fuyu", "image/qwen2_vl"])
def test_a_model_around_the_decoder_that_counts_positions_by_itself(name):
    """It counts them alike in every row: without position_ids that would be wrong for all but the longest."""
    model = retrofit(build(name).model, None, window_size=CAPACITY)
    ids, cache = tokens(2, 1) % 20 + 3, HippocampalCache.join(read(model, 5, 9))
    before = cache.clone()
    refused(r"different lengths \(5, 9\).* alike in every row: pass position_ids", lambda: logits(model, ids, 1, cache))
    assert same(cache, before)
    given = torch.tensor([[5], [9]])
    together = logits(model, ids, 1, cache, position_ids=given if name == "fuyu" else given.expand(3, 2, 1))
    for i, alone in enumerate(read(model, 5, 9)):
        close(together[i : i + 1], logits(model, ids[i : i + 1], 1, alone, position_ids=given[i : i + 1]), 1e-6)
