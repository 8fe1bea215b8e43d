"""How the server chooses tokens: the right distribution, and for each row by its own draws alone."""

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
LOGITS = torch.tensor([0.5, -1.0, 2.0, 1.0, -3.0, 0.0, 1.5, -0.5])
DRAWS = 4000
CHI_SQUARE = 24.3
"""A sum of squares of 7 degrees of freedom is above this once in a thousand times."""


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def replies(logits, *options):
    """The tokens of rows that are asked for together, token by token: ``(length, rows, V)`` makes a list for each."""
    from serving.sampling import Sampling, choose

    samplings = [None if u is None else Sampling(**u) for u in options]
    return list(zip(*(choose(step, samplings) for step in logits), strict=True))


def some_logits(length, rows, vocabulary=1000):
    return torch.randn(length, rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("many", [True, False], ids=["of-many-requests", "of-one-request"])
def test_tokens_have_their_probabilities(temperature, many):
    rows, length = (DRAWS, 1) if many else (1, DRAWS)
    options = [{"temperature": temperature, "seed": seed} for seed in range(rows)]
    drawn = torch.tensor(replies(LOGITS.expand(length, rows, -1), *options)).flatten()
    expected = DRAWS * torch.exp(LOGITS / temperature) / torch.exp(LOGITS / temperature).sum()
    assert ((drawn.bincount(minlength=8) - expected) ** 2 / expected).sum() < CHI_SQUARE


@pytest.mark.parametrize("top_p, kept", [(1e-6, 1), (0.4, 1), (0.41, 2), (0.9, 5), (0.97, 6), (0.98, 7), (1.0, 8)])
def test_top_p_keeps_the_most_probable_tokens(top_p, kept):
    probabilities = LOGITS.softmax(dim=0)
    options = [{"top_p": top_p, "seed": seed} for seed in range(DRAWS)]
    drawn = torch.tensor(replies(LOGITS.expand(1, DRAWS, -1), *options)).flatten().bincount(minlength=8)
    most = LOGITS.argsort(descending=True)[:kept]
    assert set(drawn.nonzero().flatten().tolist()) == set(most.tolist())
    expected = probabilities[most] / probabilities[most].sum() * DRAWS
    assert ((drawn[most] - expected) ** 2 / expected).sum() < CHI_SQUARE


OPTIONS = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "seed": 2, "top_p": 0.8},
    None,
    {"temperature": 0, "seed": 1},
    {"temperature": 0.7, "seed": -1},
    {"temperature": 1.0, "seed": 2**80, "top_p": 0.999},
    {"temperature": 1e-310, "seed": 3},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_among_others_is_the_row_alone(dtype):
    logits = some_logits(30, len(OPTIONS)).to(dtype)
    together = replies(logits, *OPTIONS)
    for row, options in enumerate(OPTIONS):
        assert replies(logits[:, row : row + 1], options) == [together[row]]
    for row, options in enumerate(OPTIONS):
        if options is not None and options["temperature"] in (0, 1e-310):
            assert list(together[row]) == logits[:, row].argmax(dim=1).tolist()
    assert set(together[3]) == {-1}
    assert len(set(map(tuple, replies(logits[:, 1:2].expand(-1, 3, -1), *(OPTIONS[i] for i in (1, 5, 6)))))) == 3


def test_the_probabilities_of_a_row_do_not_depend_on_their_number():
    """On a CPU, bit for bit, and so neither do the sums: rows of a batch that grows."""
    logits = some_logits(1, 16, 49152)[0]
    whole = logits.softmax(dim=1)
    for rows in (1, 2, 3, 8):
        few = logits[:rows].softmax(dim=1)
        assert torch.equal(few, whole[:rows])
        assert torch.equal(few.double().cumsum(dim=1), whole.double().cumsum(dim=1)[:rows])


def test_no_seed_is_another_reply_each_time():
    logits = some_logits(20, 1).expand(-1, 3, -1)
    assert len(set(replies(logits, {}, {}, {}))) == 3
    assert len(set(replies(logits, {"seed": 5}, {"seed": 5}, {"seed": 6}))) == 2


@pytest.mark.parametrize("draw, token", [(0.0, 40), (1 - 2**-53, 4055), (1.0, None)])
def test_the_smallest_and_the_greatest_draw_give_possible_tokens(draw, token, monkeypatch):
    """A draw of 1 stands for sums that rounding has made too small."""
    from serving.sampling import Sampling, choose

    monkeypatch.setattr(Sampling, "draw", lambda _: draw)
    logits = some_logits(1, 50, 4096)[0]
    logits[:, :40] = logits[:, -40:] = float("-inf")
    tokens = torch.tensor(choose(logits, [Sampling(top_p=p) for p in torch.linspace(0.01, 1, 50).tolist()]))
    assert bool(logits.gather(1, tokens[:, None]).isfinite().all())
    assert tokens[-1] == (logits[-1].argmax() if token is None else token)


def test_logits_that_are_no_numbers_give_no_token():
    for value in (float("nan"), float("inf")):
        logits = some_logits(1, 4)
        logits[0, 1:3, 7] = value
        drawn, greedy = {"seed": 1}, {"temperature": 0}
        found = replies(logits, drawn, drawn, greedy, greedy)
        assert found[1] == found[2] == (-1,) and -1 not in found[0] + found[3]
    assert replies(torch.full((1, 1, 9), float("-inf")), {"seed": 1}) == [(-1,)]
