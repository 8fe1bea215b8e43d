"""A kept cache has fixed addresses while ``generate`` decodes, and is otherwise what it would be: in every bit."""

# ruff: noqa: F811 - fixtures are imported

import copy
import threading

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ahn_layers import GatedDeltaNet, HippocampalCache, MaxPooling, SalientSlots, Titans
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.huggingface.fixed import fix, is_fixed, release
from ahn_layers.huggingface.layer_values import describe, tensors_of

from ..models import CAPACITY, generate, logits, retrofitted, tokens
from .recorded import ENOUGH, Replay, recorded  # noqa: F401 - a fixture
from .test_turns import chat as chat_of_a_batch

pytestmark = pytest.mark.usefixtures("unchecked")
WIDE = 60
"""A window that does not fill up."""


@pytest.fixture
def pair(recorded):
    """A model that decodes as on a GPU, and the same model as it decodes elsewhere."""
    return lambda **options: (recorded(retrofitted(**options)), retrofitted(**options))


def ones(ids):
    return {"attention_mask": torch.ones_like(ids)}


def chat(model, cache, *, first=20, rows=1, turns=3, new=10, **options):
    """A conversation; after each turn what was said and a copy of the cache."""
    ids = tokens(rows, first)
    for turn in range(turns):
        torch.manual_seed(turn)
        ids = generate(model, ids, new, cache=cache, **ones(ids), **options)
        yield ids, cache.clone()
        ids = torch.cat((ids, tokens(rows, 4, seed=turn + 5)), dim=1)


def same(cache, other):
    assert len(cache.layers) == len(other.layers) > 0
    for mine, its in zip(cache.layers, other.layers, strict=True):
        assert type(mine) is type(its) is MemoryLayer and describe(mine) == describe(its)
        a, b = tensors_of(mine), tensors_of(its)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return True


class Look(BaseStreamer):
    """Does something with every token; notes how often."""

    def __init__(self, look, after=1):
        self.look, self.after, self.count = look, after, 0

    def put(self, value):
        """The prompt comes first."""
        self.count += 1
        if self.count > self.after:
            self.look()

    def end(self):
        """Nothing."""


@pytest.mark.parametrize("first, window", [(2, 6), (CAPACITY, 6), (20, 6), (20, WIDE)])
@pytest.mark.parametrize("rows, options", [(1, {}), (3, {"do_sample": True, "top_k": 9})], ids=["greedy", "sampled"])
def test_turns_are_those_of_a_cache_that_grows(first, window, rows, options, pair):
    model, plain = pair(window_size=window)
    cache = HippocampalCache()
    found, seen = chat(model, cache, first=first, rows=rows, streamer=None, **options), []
    for one, other in zip(found, chat(plain, HippocampalCache(), first=first, rows=rows, **options), strict=True):
        assert torch.equal(one[0], other[0]) and same(one[1], other[1])
        seen.append((Replay.count, cache.nbytes == one[1].nbytes, cache.get_seq_length()))
    assert seen == [(8 * (turn + 1), True, one[0].shape[1] - 1 - 14 * (2 - turn)) for turn in range(3)]
    assert type(cache.get_seq_length()) is int


@pytest.mark.parametrize(
    "options",
    [
        {"compressor": MaxPooling},
        {"compressor": Titans},
        {"compressor": None},
        {"compressor": GatedDeltaNet, "eviction": SalientSlots(3, score="value_norm", rate=0.1)},
        {"name": "mistral_window"},
        {"name": "gpt2"},
    ],
    ids=lambda options: " ".join(getattr(u, "__name__", str(u)) for u in options.values()),
)
def test_with_other_memories_and_families(options, pair):
    model, plain = pair(**options)
    pairs = zip(chat(model, HippocampalCache()), chat(plain, HippocampalCache()), strict=True)
    assert all(torch.equal(one[0], other[0]) and same(one[1], other[1]) for one, other in pairs)
    assert Replay.count == 24


@pytest.mark.parametrize("left, window", [(0, 6), (4, 6), (4, WIDE)])
def test_rows_that_are_padded_and_finish_early(left, window, pair):
    model, plain = pair(window_size=window)
    prompts, mask = tokens(3, CAPACITY), torch.ones(3, CAPACITY, dtype=torch.long)
    mask[2, :left] = 0
    caches = HippocampalCache(), HippocampalCache()
    turns = [chat_of_a_batch(one, cache, prompts, mask) for one, cache in zip((model, plain), caches, strict=True)]
    finished = 0
    for (text, seen, *_), (other, other_seen, *_) in zip(*turns, strict=True):
        assert torch.equal(text, other) and torch.equal(seen, other_seen) and same(*caches)
        finished += not bool(seen.all())
    assert finished and Replay.count


def test_joined_rows(pair):
    model, plain = pair()
    caches, lengths, count = [], (5, 2 * CAPACITY), ENOUGH + 2
    for i, length in enumerate(lengths):
        cache = HippocampalCache()
        logits(plain, tokens(1, length, seed=i), length, cache)
        caches.append(cache)
    ids = torch.cat([tokens(1, lengths[1] + 2, seed=i) for i in range(2)])
    mask = torch.ones_like(ids)
    ids[0, : lengths[1] - 5] = mask[0, : lengths[1] - 5] = 0
    joined, other = HippocampalCache.join(caches), HippocampalCache.join(caches)
    found = [generate(one, ids, count, cache=c, attention_mask=mask) for one, c in ((model, joined), (plain, other))]
    assert torch.equal(*found) and same(joined, other) and joined.joined and Replay.count
    for row in range(2):
        assert same(joined.take(row), other.take(row))
    joined.put(0, caches[0])
    other.put(0, caches[0])
    assert same(joined, other)


@pytest.mark.parametrize("window", [6, WIDE])
def test_what_a_cache_can_do_it_can_do_afterwards(window, pair, tmp_path):
    model, plain = pair(window_size=window)
    layers, caches = None, (HippocampalCache(), HippocampalCache())
    for one, cache in zip((model, plain), caches, strict=True):
        logits(one, tokens(1, 3), 3, cache)
        layers = layers or list(cache.layers)
        ids = torch.cat((tokens(1, 3), tokens(1, 9, seed=1)), dim=1)
        generate(one, ids, 10, cache=cache, **ones(ids))
    assert all(mine is old for mine, old in zip(caches[0].layers, layers, strict=True))
    caches[0].save(tmp_path / "kept")
    assert same(HippocampalCache.load(tmp_path / "kept"), caches[1]) and same(caches[0].clone(), caches[1])
    for cache in caches:
        if window == WIDE:
            cache.crop(-4)
        else:
            with pytest.raises(RuntimeError, match="crop"):
                cache.crop(-4)
    assert same(*caches)
    outs = [logits(plain, tokens(1, 12, seed=3), (5, 6, 1), cache) for cache in caches]
    assert torch.equal(*outs) and same(*caches)
    caches[0].reset()
    assert caches[0].get_seq_length() == 0


def test_the_cache_that_generate_returns(pair):
    model, plain = pair()
    ids, options = tokens(2, 5), {"return_dict_in_generate": True, "output_logits": True}
    found, expected = (generate(one, ids, 10, **ones(ids), **options) for one in (model, plain))
    assert torch.equal(found.sequences, expected.sequences) and same(found[CACHE], expected[CACHE]) and Replay.count
    assert all(torch.equal(u, v) for u, v in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("use", ["len", "clone", "save", "take", "deepcopy", "crop"])
def test_looks_in_between_are_answered(use, pair, tmp_path):
    """By a streamer; what changes the cache ends the time of fixed addresses."""
    model, plain = pair()
    answers = {}

    def look(name, cache):
        def at_every_token():
            own = answers.setdefault(name, [])
            if use == "len":
                own.append(int(cache.get_seq_length()))
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
@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["streamer", "criterion", "after a replay"])
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


@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", ["layers.0", "layers.2"])
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


def test_threads_with_a_cache_each(pair):
    model, plain = pair()
    caches, found = [HippocampalCache() for _ in range(3)], {}

    def run(i):
        found[i] = [ids for ids, _ in chat(model, caches[i], first=4 + i)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, cache in enumerate(caches):
        other = HippocampalCache()
        assert all(torch.equal(u, v) for u, (v, _) in zip(found[i], chat(plain, other, first=4 + i), strict=True))
        assert same(cache, other)


@pytest.mark.parametrize("inside", [(True, False, True), (False, True, False)])
def test_in_and_out_of_inference_mode(inside, pair):
    model, plain = pair()
    caches = HippocampalCache(), HippocampalCache()
    ids = [tokens(1, 5)] * 2
    for turn in inside:
        with torch.inference_mode(turn):
            ids = [
                generate(one, u, 10, cache=cache, **ones(u))
                for one, u, cache in zip((model, plain), ids, caches, strict=True)
            ]
        ids = [u.clone() for u in ids]
        assert torch.equal(*ids) and same(*caches)
    assert Replay.count == 24


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


def test_a_row_that_ends_in_padding(pair):
    model, plain = pair(window_size=WIDE)
    ids, mask, caches = tokens(2, 8), torch.ones(2, 8, dtype=torch.long), (HippocampalCache(), HippocampalCache())
    mask[1, 6:] = 0
    texts = []
    for one, cache in zip((model, plain), caches, strict=True):
        text = generate(one, ids, 10, cache=cache, attention_mask=mask)
        longer = torch.cat((text, tokens(2, 2)), dim=1)
        goes_on = torch.cat((mask, torch.ones(2, 12, dtype=torch.long)), dim=1)
        texts.append(generate(one, longer, 10, cache=cache, attention_mask=goes_on))
    assert torch.equal(*texts) and same(*caches) and Replay.count


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

    monkeypatch.setattr("ahn_layers.huggingface.fixed.StaticMemoryLayer.in_place_of", fail)
    cache, other = HippocampalCache(), HippocampalCache()
    with pytest.warns(UserWarning, match="no memory for a full window"):
        found = generate(model, tokens(1, 5), 10, cache=cache, **ones(tokens(1, 5)))
    assert torch.equal(found, generate(plain, tokens(1, 5), 10, cache=other, **ones(tokens(1, 5))))
    assert same(cache, other) and not Replay.count


def test_a_text_that_passes_the_trained_length_warns(pair):
    for model in pair():
        for layer in model.model.layers:
            layer.self_attn._warn_after = 14
        cache, ids = HippocampalCache(), tokens(1, 9)
        with pytest.warns(UserWarning, match="the text has passed the trained length of 14"):
            generate(model, ids, 10, cache=cache, **ones(ids))
    assert Replay.count


@pytest.mark.parametrize("options", [{"name": "gemma2"}, {"name": "falcon_h1"}, {"layers": [0, 2]}], ids=str)
def test_what_cannot_be_fixed_goes_on_as_ever(options, pair):
    model, plain = pair(**options)
    cache, other, ids = HippocampalCache(), HippocampalCache(), tokens(1, 9)
    for _ in range(2):
        texts = [generate(one, ids, 10, cache=c, **ones(ids)) for one, c in ((model, cache), (plain, other))]
        assert torch.equal(*texts) and not Replay.count
        ids = torch.cat((texts[0], tokens(1, 3)), dim=1)


def test_decoding_can_be_told_to_stay_as_it_is(pair):
    model, _ = pair()
    for options in ({"disable_compile": True}, {"cache_implementation": "dynamic"}):
        generate(model, tokens(1, 9), 10, cache=HippocampalCache(), **options)
    assert not Replay.count
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens(1, 9), 10, cache=HippocampalCache(), cache_implementation="static")
