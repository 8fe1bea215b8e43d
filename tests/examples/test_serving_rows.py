"""The engine of the server without the web: what a request depends on, and what goes wrong in one of them alone."""

import queue
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import pytest
import torch

from ahn_layers import HippocampalCache
from tests.models import retrofitted

pytest.importorskip("pydantic")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Bytes:
    """A tokenizer."""

    def decode(self, ids, **_):
        return "".join(chr(64 + i) for i in ids)


class Asked:
    """A request, its events, and the logits of every step that it took part in."""

    def __init__(self, ids, *, temperature=1.0, **options):
        from serving.request import Request
        from serving.sampling import Sampling
        from serving.text import TextStream

        self.events, self.logits = queue.Queue(), []
        self.request = Request(
            ids, TextStream(Bytes()), Sampling(temperature, seed=7), self.events.put, 10, keep=True, **options
        )

    def end(self):
        """Its last event."""
        from serving.request import Piece

        while isinstance(event := self.events.get(timeout=60), Piece):
            pass
        return event

    @property
    def reply(self):
        return self.request.stream.ids


@contextmanager
def running(model, **options):
    """An engine; yields it and what asks it, whose logits are recorded."""
    from serving.engine import Engine

    engine, asked, step = Engine(model, **{"rows": 4, "piece": 8} | options), [], None

    def ask(ids, **options):
        asked.append(Asked(ids, **options))
        engine.submit(asked[-1].request)
        return asked[-1]

    def recorded():
        logits = step()
        for one in asked:
            if one.request in engine.batch.users:
                one.logits.append(logits[engine.batch.users.index(one.request)].clone())
        return logits

    step, engine.batch.step = engine.batch.step, recorded
    engine.start()
    try:
        yield engine, ask
    finally:
        engine.close(0)


def ids(length, seed):
    return torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("stepwise", [0, 5])
@pytest.mark.parametrize("length", [3, 21])
def test_with_fixed_rows_no_bit_depends_on_other_requests(stepwise, length):
    model = retrofitted().float()

    def turns(others):
        with running(model, fixed=True, stepwise=stepwise) as (_, ask):
            crowd = [ask(ids(30 - i, i), temperature=i % 3) for i in range(others)]
            first = ask(ids(13, 50), shared=4)
            cache = first.end().cache
            crowd += [ask(ids(5 + i, i), temperature=i % 2) for i in range(others)]
            second = ask(ids(length, 51), cache=cache)
            for one in (second, *crowd):
                one.end()
            return first, second

    for alone, among in zip(turns(0), turns(7), strict=True):
        assert alone.reply == among.reply and len(alone.reply) == 10
        assert len(alone.logits) == len(among.logits)
        assert all(map(torch.equal, alone.logits, among.logits))
        steps_of_the_prompt = len(alone.logits) - 9
        left = {3: 3, 21: 5}.get(len(alone.request.ids), 1)  # of 13: a beginning of 4, a piece of 8
        assert steps_of_the_prompt == (left if stepwise else 0)


def test_prompts_by_steps_are_prompts_by_pieces():
    model = retrofitted().double()
    replies = []
    for stepwise in (0, 6):
        with running(model, stepwise=stepwise) as (_, ask):
            cache = ask(ids(9, 0), temperature=0).end().cache
            several = [ask(ids(6 + i, i), temperature=(i + 1) % 2, cache=cache.clone()) for i in range(4)]
            assert all(one.end().reason == "length" for one in several)
            replies.append([one.reply for one in several])
            assert [len(one.logits) - 9 for one in several] == ([0] * 4 if stepwise == 0 else [6, 0, 0, 1])
    assert replies[0] == replies[1]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_cache_of_another_memory_fails_alone(fixed):
    """Also if it is the first that takes a row."""
    from serving.request import Failed

    model, other = retrofitted(), retrofitted()
    for parameter in other.parameters():
        parameter.data += 0.1
    foreign = HippocampalCache()
    with torch.no_grad():
        other(torch.tensor([ids(5, 0)]), cache=foreign, use_cache=True)
    with running(model, fixed=fixed, stepwise=8) as (engine, ask):
        first, good = ask(ids(4, 1), cache=foreign), ask(ids(4, 2))
        found = first.end()
        assert isinstance(found, Failed) and isinstance(found.error, ValueError) and "memory" in str(found.error)
        assert good.end().reason == "length" and ask(ids(4, 3)).end().reason == "length"
        assert engine.is_healthy and not engine.batch.active


def test_logits_that_are_no_numbers_fail_alone(monkeypatch):
    from serving.request import Failed

    with running(retrofitted(), fixed=True) as (engine, ask):
        step = engine.batch.step

        def broken():
            logits = step()
            for row, user in enumerate(engine.batch.users):
                if user is not None and len(user.ids) == 5:
                    logits[row] = float("nan")
            return logits

        monkeypatch.setattr(engine.batch, "step", broken)
        bad, good = ask(ids(5, 1)), ask(ids(6, 2))
        found = bad.end()
        assert isinstance(found, Failed) and "not finite" in str(found.error)
        assert good.end().reason == "length" and engine.is_healthy


@pytest.mark.parametrize("fixed", [False, True])
def test_a_row_that_nobody_uses_runs_into_no_end(fixed):
    """Of learned positions, which are as many as there are."""
    from serving.batch import Batch

    model, caches = retrofitted("gpt2"), [HippocampalCache() for _ in range(3)]
    with torch.no_grad():
        for cache, length in zip(caches, (240, 20, 30), strict=True):
            model(torch.tensor([ids(length, length)]), cache=cache, use_cache=True)
        batch = Batch(model, 4, fixed=fixed)
        for cache in caches:
            batch.join(cache, cache, 1)
        alone = caches[1].clone()
        batch.leave(caches[0], keep=False)
        for _ in range(40):
            found = batch.step()[batch.users.index(caches[1])]
            expected = model(torch.ones(1, 1, dtype=torch.long), cache=alone, use_cache=True).logits[0, -1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
            batch.tokens = [1] * len(batch.tokens)
    assert model.config.max_position_embeddings < 240 + 40


def test_a_reply_ends_with_the_learned_positions():
    """And nobody else's does."""
    with running(retrofitted("gpt2")) as (engine, ask):
        long, other = ask(ids(250, 1)), ask(ids(5, 2))
        assert long.end().reason == other.end().reason == "length" and engine.is_healthy
        assert len(long.reply) == 7 and len(other.reply) == 10, "256 positions: the last token is never read"
