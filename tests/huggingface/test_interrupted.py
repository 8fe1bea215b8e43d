"""A call either goes through all layers, or leaves the cache as it was, or says that the cache is unusable."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ahn_layers import GatedDeltaNet, HippocampalCache, retrofit
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.huggingface.layer_values import tensors_of
from ahn_layers.huggingface.transaction import settle

from ..models import CAPACITY, base, retrofitted, tokens

LONG = 3 * CAPACITY
pytestmark = pytest.mark.usefixtures("unchecked")


class UnexpectedError(Exception):
    """An error of nobody's."""


def call(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, use_cache=True, **options, **{CACHE: cache}).logits


def interrupt(model, ids, cache, place, error, **options):
    """A call that ends in the middle of the model."""

    def stop(*_):
        raise error

    handle = place.register_forward_hook(stop)
    try:
        with pytest.raises(error):
            call(model, ids, cache, **options)
    finally:
        handle.remove()


def static():
    return StaticCache(retrofitted().config, 64)


@pytest.mark.parametrize("error", [UnexpectedError, KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("length", [0, 3, CAPACITY - 2])
def test_the_cache_is_what_it_was(length, layer, error):
    """As long as nothing in it has been overwritten: it goes on as if the call had never been made."""
    model, ids, new = retrofitted(), tokens(2, max(1, length)), tokens(2, 5, seed=1)
    cache, untouched = HippocampalCache(), HippocampalCache()
    for one in (cache, untouched) if length else ():
        call(model, ids, one)
    interrupt(model, new, cache, model.model.layers[layer], error)
    assert torch.equal(call(model, new, cache), call(model, new, untouched))
    assert cache.get_seq_length() == untouched.get_seq_length() == length + 5


@pytest.mark.parametrize("count", [1, 4, CAPACITY])
def test_a_large_window_is_not_held_twice(count, monkeypatch):
    """While it grows, its old tokens are the first of the new ones; only a call that fills it up cannot be undone."""
    monkeypatch.setattr("ahn_layers.huggingface.transaction._LARGE", 0)
    model, ids, new = retrofitted(), tokens(2, 4), tokens(2, count, seed=1)
    cache, untouched = HippocampalCache(), HippocampalCache()
    for one in (cache, untouched):
        call(model, ids, one)
    interrupt(model, new, cache, model.model.layers[1], UnexpectedError)
    if count == CAPACITY:
        with pytest.raises(RuntimeError, match="this cache is unusable"):
            call(model, new, cache)
        return
    assert torch.equal(call(model, new, cache), call(model, new, untouched))


@pytest.mark.parametrize("error", [UnexpectedError, KeyboardInterrupt])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("make", [HippocampalCache, DynamicCache, static])
def test_an_overwritten_cache_refuses_to_go_on(make, count, error):
    model, cache = retrofitted(), make()
    call(model, tokens(1, LONG), cache)
    interrupt(model, tokens(1, count, seed=1), cache, model.model.layers[1], error)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this cache is unusable: a call was interrupted"):
            call(model, tokens(1, 1), cache)
    cache.reset()
    assert torch.equal(call(model, tokens(1, 5), cache), call(model, tokens(1, 5), make()))


@pytest.mark.parametrize("error", [UnexpectedError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 2])
def test_fixed_addresses_go_back_while_nothing_has_left_the_window(layer, error):
    """Rows and padding too, without a trace in the slots."""
    model, new, cache, other = retrofitted(), tokens(2, 3, seed=1), static(), static()
    mask = torch.ones(2, CAPACITY, dtype=torch.long)
    mask[0, :2], mask[1, -2] = 0, 0
    for one in (cache, other):
        call(model, tokens(2, CAPACITY - 3), one, attention_mask=mask[:, :-3])
    interrupt(model, new, cache, model.model.layers[layer], error, attention_mask=mask)
    settle(cache)  # as the next use does
    for mine, its in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.pads, its.pads) and mine.padding == its.padding
        assert all(torch.equal(u, v) for u, v in zip(tensors_of(mine).values(), tensors_of(its).values(), strict=True))
    assert torch.equal(call(model, new, cache, attention_mask=mask), call(model, new, other, attention_mask=mask))
    interrupt(model, tokens(2, 4), cache, model.model.layers[layer], error)  # the first row loses a token
    with pytest.raises(RuntimeError, match="this cache is unusable"):
        call(model, new, cache)


@pytest.mark.parametrize("make", [HippocampalCache, static])
def test_an_interruption_before_the_first_layer_has_run_changes_nothing(make):
    model, cache, other = retrofitted(), make(), make()
    for one in (cache, other):
        call(model, tokens(1, LONG), one)
    interrupt(model, tokens(1, 2, seed=1), cache, model.model.embed_tokens, UnexpectedError)
    assert torch.equal(call(model, tokens(1, 2, seed=1), cache), call(model, tokens(1, 2, seed=1), other))


@pytest.mark.parametrize("use", ["save", "clone", "reorder", "deepcopy", "crop"])
def test_what_is_done_with_a_cache_after_an_interruption_sees_it_as_it_was(use, tmp_path):
    """Ctrl-C: no hook runs any more, so the cache is put back when it is used."""
    model, ids, cache = retrofitted(), tokens(2, 5), HippocampalCache()
    call(model, ids, cache)
    interrupt(model, tokens(2, 2, seed=1), cache, model.model.layers[1], KeyboardInterrupt)
    if use == "save":
        cache.save(tmp_path / "cache")
        cache = HippocampalCache.load(tmp_path / "cache")
    elif use == "clone":
        cache = cache.clone()
    elif use == "reorder":
        cache = cache.reorder(torch.tensor([0, 1]))
    elif use == "deepcopy":
        cache = copy.deepcopy(cache)
    elif use == "crop":
        cache.crop(-1)
        call(model, ids[:, -1:], cache)
    whole = call(model, torch.cat((ids, tokens(2, 2, seed=1)), dim=1), HippocampalCache())
    assert torch.allclose(call(model, tokens(2, 2, seed=1), cache), whole[:, -2:], rtol=0, atol=1e-12)


def test_a_plain_cache_that_was_cropped_after_an_interruption_says_so():
    model, cache = retrofitted(), DynamicCache()
    call(model, tokens(1, 5), cache)
    interrupt(model, tokens(1, 2, seed=1), cache, model.model.layers[1], KeyboardInterrupt)
    cache.crop(-1)
    with pytest.raises(RuntimeError, match="this cache is unusable"):
        call(model, tokens(1, 1), cache)


def test_a_compressor_that_raises():
    class Raising(GatedDeltaNet):
        faulty = False

        def scan(self, *args, **options):
            if Raising.faulty:
                raise UnexpectedError
            return super().scan(*args, **options)

    model = retrofit(base(), Raising, window_size=6, num_sinks=2)
    cache, other = HippocampalCache(), HippocampalCache()
    for one in (cache, other):
        call(model, tokens(1, CAPACITY), one)
    Raising.faulty = True
    with pytest.raises(UnexpectedError):
        call(model, tokens(1, 3, seed=1), cache)
    Raising.faulty = False
    assert torch.equal(call(model, tokens(1, 3, seed=1), cache), call(model, tokens(1, 3, seed=1), other))


def test_a_cache_that_was_growing_beside_other_layers():
    """Only some layers are retrofitted: those of transformers go back too."""
    model = retrofitted("gemma2", window_size=30)
    ids, new = tokens(1, 6), tokens(1, 2, seed=1)
    cache, other = (HippocampalCache() for _ in range(2))
    for one in (cache, other):
        call(model, ids, one)
    interrupt(model, new, cache, model.model.layers[1], UnexpectedError)
    assert torch.equal(call(model, new, cache), call(model, new, other))


def test_generate_after_an_interrupted_generate():
    model, ids, cache = retrofitted(window_size=40), tokens(1, 6), HippocampalCache()
    calls = []

    def stop(*_):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=8, do_sample=False, **{CACHE: cache})
    handle.remove()
    text = model.generate(ids, max_new_tokens=2, do_sample=False)
    more = torch.cat((text, tokens(1, 2, seed=3)), dim=1)
    out = model.generate(more, max_new_tokens=3, do_sample=False, **{CACHE: cache})
    assert torch.equal(out, model.generate(more, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("make", [HippocampalCache, DynamicCache, static])
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(make):
    """And the other way round, as servers do it."""
    model, ids = retrofitted(), tokens(1, LONG + 4)
    cache = make()
    with torch.inference_mode():
        model(ids[:, :LONG], **{CACHE: cache})
    outs = [call(model, ids[:, LONG : LONG + 2], cache)]
    with torch.inference_mode():
        outs.append(model(ids[:, LONG + 2 : LONG + 3], **{CACHE: cache}).logits.clone())
    outs.append(call(model, ids[:, LONG + 3 :], cache))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, LONG:]
    assert torch.allclose(torch.cat(outs, dim=1), expected, rtol=0, atol=1e-9)
