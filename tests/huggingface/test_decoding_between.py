"""What others see and change of a kept cache while ``generate`` decodes, and what an early end leaves of it."""

# ruff: noqa: F811 - fixtures are imported

import copy

import pytest
import torch
from transformers import StoppingCriteriaList

from ahn_layers import GatedDeltaNet, HippocampalCache
from ahn_layers.huggingface.fixed import fix, is_fixed, release

from ..models import CAPACITY, generate, logits, retrofitted, tokens
from .keeping import WIDE, Look, chat, ones, pair, same  # noqa: F401 - a fixture
from .recorded import ENOUGH, Replay, recorded  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("use", ["len", "clone", "save", "take", "deepcopy", "crop"])
def test_looks_in_between_are_answered(use, pair, tmp_path):
    """By a streamer; what changes the cache ends the time of fixed addresses."""
    model, plain = pair()
    answers = {}

    def look(name, cache):
        def at_every_token():
            own = answers.setdefault(name, [])
            if use == "len":
                own.append(cache.get_seq_length())
            elif use == "crop":
                cache.crop(0)
            else:
                copies = {"clone": cache.clone, "take": lambda: cache.take(0), "deepcopy": lambda: copy.deepcopy(cache)}
                if use == "save":
                    cache.save(tmp_path / name)
                copied = HippocampalCache.load(tmp_path / name) if use == "save" else copies[use]()
                own.append(logits(plain, tokens(1, 4, seed=1), (3, 1), copied))

        return Look(at_every_token)

    found, caches = [], []
    for name, one in (("fixed", model), ("growing", plain)):
        cache, ids = HippocampalCache(), tokens(1, 3)
        found.append(generate(one, ids, 9, cache=cache, streamer=look(name, cache), **ones(ids)))
        caches.append(cache)
    assert torch.equal(*found) and same(*caches)
    for mine, its in zip(*answers.values(), strict=True) if answers.get("fixed") else ():
        assert type(mine) is type(its)
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use", ["forward", "reorder_cache", "batch_repeat_interleave", "put", "reset"])
@pytest.mark.parametrize("length", [3, 20])
def test_changes_in_between(use, length):
    model, caches = retrofitted(), (HippocampalCache(), HippocampalCache())
    for cache in caches:
        logits(model, tokens(2, length), length, cache)
    with torch.no_grad():
        fix(caches[0])
    for cache in caches:
        if use == "reorder_cache":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif use == "batch_repeat_interleave":
            cache.batch_repeat_interleave(2)
        elif use == "put":
            cache.put(1, caches[1].take(0))
        elif use == "reset":
            cache.reset()
    assert is_fixed(caches[0]) == (use == "forward")
    new = tokens(4 if use == "batch_repeat_interleave" else 2, 7, seed=2)
    outs = [logits(model, new, (3, 1, 3), cache) for cache in caches]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)


class StoppedError(Exception):
    """An error of nobody's."""


@pytest.mark.parametrize("window", [6, WIDE])
@pytest.mark.parametrize(
    "place, error",
    [("streamer", StoppedError), ("criterion", KeyboardInterrupt), ("after a replay", KeyboardInterrupt)],
)
def test_an_end_between_two_steps(place, error, window, pair, monkeypatch):
    model, plain = pair(window_size=window)

    def stop(*_):
        raise error

    caches, texts = [], []
    for one in (model, plain):
        cache, ids = HippocampalCache(), tokens(1, 12)
        options, calls = {}, []
        if place == "streamer":
            options["streamer"] = Look(stop, after=5)
        elif place == "criterion":

            def criterion(ids, scores, calls=calls, **_):
                calls.append(None)
                if len(calls) == 5:
                    raise error
                return torch.zeros(len(ids), dtype=torch.bool)

            options["stopping_criteria"] = StoppingCriteriaList([criterion])
        elif one is model:
            monkeypatch.setattr(Replay, "during", staticmethod(lambda: Replay.count == 3 and stop()))
        else:
            options["streamer"] = Look(lambda cache=cache: cache.get_seq_length() == 16 and stop(), after=1)
        with pytest.raises(error):
            generate(one, ids, 30, cache=cache, **ones(ids), **options)
        caches.append(cache)
        monkeypatch.setattr(Replay, "during", staticmethod(lambda: None))
        texts.append(logits(plain, tokens(1, 4, seed=1), (3, 1), cache.clone()))
    assert torch.equal(*texts) and same(*caches)


@pytest.mark.parametrize("layer, error", [("layers.0", StoppedError), ("layers.2", KeyboardInterrupt)])
@pytest.mark.parametrize("first, window", [(3, WIDE), (CAPACITY - 1, 6), (CAPACITY, 6), (20, 6)])
def test_an_end_inside_the_first_step(first, window, layer, error, pair):
    """The same state, or the same refusal, as in a cache that grows."""
    model, plain = pair(window_size=window)
    caches, ids = [], tokens(2, first)
    for one in (model, plain):
        cache, calls = HippocampalCache(), []

        def stop(*_, calls=calls):
            calls.append(None)
            if len(calls) == 2:
                raise error

        handle = one.model.get_submodule(layer).register_forward_hook(stop)
        with pytest.raises(error):
            generate(one, ids, 30, cache=cache, **ones(ids))
        handle.remove()
        assert not is_fixed(cache)
        caches.append(cache)
    for cache in caches:
        if first >= CAPACITY and window == 6:
            with pytest.raises(RuntimeError, match="this cache is unusable"):
                cache.clone()
            cache.reset()
            generate(model, ids, 10, cache=cache, **ones(ids))
        else:
            assert cache.get_seq_length() == first
    if first < CAPACITY or window == WIDE:
        outs = [logits(plain, tokens(2, 4, seed=1), (3, 1), cache) for cache in caches]
        assert torch.equal(*outs)
    assert same(*caches)


def test_an_end_inside_the_prompt(pair):
    model, plain = pair(window_size=WIDE)
    cache, other = HippocampalCache(), HippocampalCache()
    for one, own in ((model, cache), (plain, other)):
        ids = generate(one, tokens(1, 5), 10, cache=own, **ones(tokens(1, 5)))
        handle = one.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(StoppedError))
        more = torch.cat((ids, tokens(1, 3, seed=4)), dim=1)
        with pytest.raises(StoppedError):
            generate(one, more, 10, cache=own, **ones(more))
        handle.remove()
    found = [generate(one, more, 10, cache=own, **ones(more)) for one, own in ((model, cache), (plain, other))]
    assert torch.equal(*found) and same(cache, other)


def test_what_one_call_was_asked_for_is_not_what_the_next_one_is(pair):
    """Though the traceback of an error holds the recorded step of the first one."""
    model, plain = pair()
    ids, cache, other = tokens(1, 6), HippocampalCache(), HippocampalCache()
    with pytest.raises(StoppedError) as held:
        generate(model, ids, 20, cache=cache, logits_processor=[Raise(6)], **ones(ids))
    with pytest.raises(StoppedError):
        generate(plain, ids, 20, cache=other, logits_processor=[Raise(6)], **ones(ids))
    ids = tokens(1, cache.get_seq_length() + 2)
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    found, expected = (
        generate(one, ids, 10, cache=c, **asked, **ones(ids)) for one, c in ((model, cache), (plain, other))
    )
    assert held.value.__traceback__ is not None and torch.equal(found.sequences, expected.sequences)
    for mine, its in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(mine, its, strict=True))


def test_an_end_inside_the_first_step_after_a_row_has_finished(pair):
    """Its padding is noted before the step, which then takes nothing in."""
    model, plain = pair(window_size=WIDE)
    ids = tokens(3, CAPACITY)
    free = generate(plain, ids, 12, eos_token_id=None)[:, CAPACITY:]
    end = next(int(u) for u in free[0, 4:] if not bool((free[:, :4] == u).any()))
    options = {"eos_token_id": end, "pad_token_id": 0} | ones(ids)
    caches, ended = [], []
    for one in (model, plain):
        cache = HippocampalCache()

        def stop(*_, cache=cache):
            if not Replay.silent and ((Replay.count and not ended) or [cache.get_seq_length()] == ended):
                ended.append(cache.get_seq_length())
                raise StoppedError

        handle = one.model.layers[1].register_forward_hook(stop)
        with pytest.raises(StoppedError):
            generate(one, ids, 30, cache=cache, **options)
        handle.remove()
        caches.append(cache)
    assert ended[0] > CAPACITY + 1 and ended[0] == ended[1]
    outs = [logits(plain, tokens(3, 4, seed=1), (3, 1), cache) for cache in caches]
    assert torch.equal(*outs) and same(*caches)


class LearnedStart(GatedDeltaNet):
    """Its state before the first token is a weight."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.start = torch.nn.Parameter(super().init_state(1, torch.zeros(())).clone() + 0.1)

    def init_state(self, batch_size, like):
        """The weight itself."""
        return self.start.to(like).expand(batch_size, *self.start.shape[1:])


@torch.no_grad()
def test_nothing_that_others_hold_is_overwritten(pair):
    """Neither a weight that a state begins with, nor a state of a window that is not full."""
    model, plain = pair(compressor=LearnedStart)
    model.float(), plain.float()
    weights = [u.clone() for u in model.state_dict().values()]
    cache, other = HippocampalCache(), HippocampalCache()
    for one, own in ((model, cache), (plain, other)):
        logits(one, tokens(1, 3), 3, own)
    before = {name: u.clone() for name, u in cache.layers[0].state.tensors().items()}
    state = cache.layers[0].state
    fix(cache)
    logits(model, tokens(1, 9), 1, cache)
    release(cache)
    assert all(torch.equal(u, before[name]) for name, u in state.tensors().items()) and len(state.slots) == 3
    logits(plain, tokens(1, 9), 1, other)
    texts = [generate(one, tokens(1, 14), 12, cache=c) for one, c in ((model, cache), (plain, other))]
    assert torch.equal(*texts) and Replay.count
    assert all(torch.equal(u, v) for u, v in zip(model.state_dict().values(), weights, strict=True))


def test_layers_that_disagree_are_unusable():
    model, cache = retrofitted(), HippocampalCache()
    logits(model, tokens(2, 5), 5, cache)
    with torch.no_grad():
        fix(cache)
    cache.layers[1].state.seen += 1
    release(cache)
    with pytest.raises(RuntimeError, match="this cache is unusable"):
        cache.clone()


def test_a_cache_that_was_left_fixed(pair):
    """A second interruption may hit the moment in which it is released: the next call does that."""
    model, plain = pair(window_size=WIDE)
    cache, ids = HippocampalCache(), tokens(1, 5)
    logits(model, ids, 5, cache)
    with torch.no_grad():
        fix(cache)
    assert is_fixed(cache) and is_fixed(copy.deepcopy(cache))
    assert all(layer.growing.state is None for layer in cache.layers)  # nothing is held twice
    copied = copy.deepcopy(cache)
    copied.crop(-2)
    assert copied.get_seq_length() == 3 and not is_fixed(copied)
    more = torch.cat((ids, tokens(1, 2)), dim=1)
    assert torch.equal(generate(model, more, 10, cache=cache, **ones(more)), generate(plain, more, 10, **ones(more)))
    assert not is_fixed(cache)


class Raise:
    """A processor of logits that fails."""

    def __init__(self, after):
        self.left = after

    def __call__(self, input_ids, scores):
        """Count down."""
        self.left -= 1
        if self.left == 0:
            raise StoppedError
        return scores


def test_no_memory_for_a_full_window(pair, monkeypatch):
    model, plain = pair(window_size=WIDE)

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("ahn_layers.huggingface.fixed._in_place_of", fail)
    cache, other = HippocampalCache(), HippocampalCache()
    with pytest.warns(UserWarning, match="no memory for a full window"):
        found = generate(model, tokens(1, 5), 10, cache=cache, **ones(tokens(1, 5)))
    assert torch.equal(found, generate(plain, tokens(1, 5), 10, cache=other, **ones(tokens(1, 5))))
    assert same(cache, other) and not Replay.count
