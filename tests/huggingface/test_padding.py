"""What a mask says about the past and what the cache has taken in agree, are made to agree, or are an error."""

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ahn_layers import KDA, GatedDeltaNet, HippocampalCache, MemoryStore, Window
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.huggingface.padding import Padding
from ahn_layers.without import without

from ..methods import COMPRESSORS, OPTIONS
from ..models import CAPACITY, FAMILIES, base, retrofitted, tokens
from .test_positions import Frozen

LONG = 3 * CAPACITY
pytestmark = pytest.mark.usefixtures("unchecked")


def call(model, ids, cache, mask=None):
    """Logits of new tokens; positions as ``generate`` computes them from the mask."""
    positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=True, **positions, **{CACHE: cache}).logits


def alone(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def kinds_of_cache(model):
    return {"own": HippocampalCache, "dynamic": DynamicCache, "static": lambda: StaticCache(model.config, 64)}


@pytest.mark.parametrize("cache", ["own", "dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("hidden", [(3, 6), (0, 1), (5, 8)], ids=str)
def test_tokens_within_the_window_can_be_taken_back(family, cache, hidden):
    """The second row hides tokens that were read as real; the first keeps its own. The base model sees the same."""
    model, plain = retrofitted(family, window_size=30), base(family)
    held, new, more = tokens(2, 8), tokens(2, 4, seed=1), tokens(2, 3, seed=2)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, slice(*hidden)] = 0
    outs = []
    for one, filled in ((model, kinds_of_cache(model)[cache]()), (plain, DynamicCache(config=plain.config))):
        call(one, held, filled)
        outs.append(torch.cat((call(one, new, filled, mask[:, :12]), call(one, more, filled, mask)), dim=1))
    assert torch.allclose(*outs, rtol=0, atol=FAMILIES[family].tolerance)


@pytest.mark.parametrize("cache", ["own", "static"])
def test_only_rows_that_have_folded_are_stuck(cache):
    """A row with padding has not outgrown its window: its tokens can be taken back, those of the other cannot."""
    model, ids = retrofitted(), tokens(2, CAPACITY + 3)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    filled = kinds_of_cache(model)[cache]()
    call(model, ids, filled, mask)
    new, longer = tokens(2, 2, seed=1), torch.cat((mask, mask.new_ones(2, 2)), dim=1)
    stuck = longer.clone()
    stuck[0, 4] = stuck[1, -3] = 0
    with pytest.raises(ValueError, match=r"rows \[0\].*cannot be undone"):
        call(model, new, filled, stuck)
    longer[1, -3] = 0
    out = call(model, new, filled, longer)
    for row in range(2):
        text = torch.cat((ids, new), dim=1)[row][longer[row].bool()][None]
        assert torch.allclose(out[row], alone(model, text)[0, -2:], rtol=0, atol=1e-9)


def test_recorded_tokens_can_be_taken_back_beyond_the_window():
    model, ids = retrofitted(), tokens(1, LONG)
    cache = HippocampalCache()
    call(model, ids, cache)
    cache.activate_past_recording()
    call(model, tokens(1, 5, seed=1), cache)
    mask = torch.ones(1, LONG + 7, dtype=torch.long)
    mask[0, LONG + 2 : LONG + 5] = 0
    out = call(model, tokens(1, 2, seed=2), cache, mask)
    text = torch.cat((ids, tokens(1, 5, seed=1), tokens(1, 2, seed=2)), dim=1)[mask.bool()][None]
    assert torch.allclose(out, alone(model, text)[:, -2:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [CAPACITY - 2, LONG])
def test_padding_that_moves_is_an_error(length):
    """As many real tokens as before, but others."""
    model, ids = retrofitted(), tokens(2, length)
    mask = torch.ones(2, length + 1, dtype=torch.long)
    mask[0, 1] = 0
    cache = HippocampalCache()
    call(model, ids, cache, mask[:, :-1])
    mask[0, 1], mask[0, 3] = 1, 0
    with pytest.raises(ValueError, match=r"rows \[0\] as real that the cache has never taken in"):
        call(model, ids[:, :1], cache, mask)


@pytest.mark.parametrize("change", ["reorder", "clone", "save", "crop", "repeat", "select"])
def test_the_account_of_padding_follows_the_cache(change, tmp_path):
    model, ids = retrofitted(window_size=20), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    cache = HippocampalCache()
    call(model, ids, cache, mask)
    if change == "reorder":
        cache, mask = cache.reorder(torch.tensor([1, 0])), mask[[1, 0]]
    elif change == "clone":
        cache = cache.clone()
    elif change == "save":
        cache.save(tmp_path / "cache")
        cache = HippocampalCache.load(tmp_path / "cache")
    elif change == "crop":
        cache.crop(-2)
        mask = mask[:, :-2]
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        mask = mask.repeat_interleave(2, dim=0)
    else:
        cache.batch_select_indices(torch.tensor([1]))
        mask = mask[1:]
    new = tokens(1, 2, seed=1).expand(len(mask), -1)
    wrong, right = (torch.cat((kind, new.new_ones(len(mask), 2)), 1) for kind in (torch.ones_like(mask), mask))
    with pytest.raises(ValueError, match="never taken in"):
        call(model, new, cache, wrong)
    assert call(model, new, cache, right).isfinite().all()


@pytest.mark.parametrize("size", ["short", "long", "new tokens only", "rows"])
@pytest.mark.parametrize("past", [0, 7, LONG])
def test_masks_of_another_shape_are_errors(past, size):
    model, cache = retrofitted(), HippocampalCache()
    if past:
        call(model, tokens(2, past), cache)
    shapes = {"short": (2, past + 2), "long": (2, past + 4), "new tokens only": (2, 3), "rows": (1, past + 3)}
    rows, columns = shapes[size]
    if (rows, columns) == (2, past + 3):
        return
    with torch.no_grad(), pytest.raises(ValueError, match="a column for each of"):
        model(tokens(2, 3), attention_mask=torch.ones(rows, columns).long(), **{CACHE: cache})
    assert cache.get_seq_length() == past


def test_turns_of_padding():
    """Against masks that are put together column by column."""
    for row in itertools.product([True, False], repeat=5):
        real = torch.tensor([row, (True,) * 5])
        whole = Padding.none(2).extended(real, 0)
        parts = Padding.none(2).extended(real[:, :2], 0).extended(real[:, 2:], 2)
        assert whole == parts and torch.equal(whole.real(5), real)
        assert torch.equal(whole.cropped(3).real(3), real[:, :3]) and whole.any == (not all(row))


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("seen", [1, 3, 9])
def test_a_state_without_some_tokens_is_the_state_of_the_others(sinks, seen):
    store = MemoryStore(Window(9 - sinks, sinks), GatedDeltaNet(12, 2, 4)).double()
    q, k, v = torch.randn(3, 2, 2, 9 + 6, 4, dtype=torch.float64)
    x = torch.randn(2, 9 + 6, 12, dtype=torch.float64)
    _, state = store(q[:, :, :seen], k[:, :, :seen], v[:, :, :seen], x[:, :seen])
    gone = torch.zeros(2, seen, dtype=torch.bool)
    gone[0, seen // 2] = True
    kept = [torch.tensor([c for c in range(15) if not (row == 0 and c == seen // 2)]) for row in range(2)]
    out, _ = store(q[:, :, seen:], k[:, :, seen:], v[:, :, seen:], x[:, seen:], without(state, gone))
    for row in range(2):
        one = [u[row : row + 1, :, kept[row]] for u in (q, k, v)]
        expected, _ = store(*one, x[row : row + 1, kept[row]])
        assert torch.allclose(out[row], expected[0, :, -out.shape[2] :], rtol=0, atol=1e-12)


def test_the_base_model_answers_the_same_within_the_window():
    """The reproduction of a second turn of a batch whose first row finished early."""
    plain, held, new = base(), tokens(2, 8), tokens(2, 4, seed=1)
    model = retrofitted(model=base(), window_size=30)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 5:8] = 0
    outs = []
    for one, cache in ((plain, DynamicCache()), (model, HippocampalCache())):
        call(one, held, cache)
        outs.append(call(one, new, cache, mask))
    assert torch.allclose(*outs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("choice", ["absolute", "none"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_padded_row_without_position_ids_is_the_row_alone(compressor, choice):
    """The base model then counts columns, which its attention does not notice; memories with channels apart do."""
    options = {"memory_positions": choice, **OPTIONS.get(compressor, {})}
    model, mask = retrofitted(compressor=compressor, **options), torch.ones(2, LONG, dtype=torch.long)
    ids, mask[0, :5] = tokens(2, LONG), 0
    for cuts in ([LONG], [3, LONG - 3], [7, 1, 1, LONG - 9]):
        cache, outs, end = HippocampalCache(), [], 0
        for piece in ids.split(cuts, dim=1):
            end += piece.shape[1]
            with torch.no_grad():
                given = {} if len(cuts) == 1 else {"use_cache": True, CACHE: cache}
                outs.append(model(piece, attention_mask=mask[:, :end], **given).logits)
        out = torch.cat(outs, dim=1)
        assert torch.allclose(out[:1, 5:], alone(model, ids[:1, 5:]), rtol=0, atol=1e-4)
        assert torch.allclose(out[1:], alone(model, ids[1:]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_so_it_is_where_the_rotation_cannot_be_undone(kind):
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 512}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    model = retrofitted(model=base(rope_parameters=Frozen(scaling), max_position_embeddings=512), compressor=KDA)
    ids, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask).logits
    assert torch.allclose(out[:1, 5:], alone(model, ids[:1, 5:]), rtol=0, atol=1e-4)
