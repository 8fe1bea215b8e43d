"""Needles lie where they are said to, and are scored as greedy decoding finds them."""

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib")
import arms  # noqa: E402
import needles  # noqa: E402

from .trying import made, small, tokenizer  # noqa: E402


@pytest.mark.parametrize("task", sorted(needles.TASKS))
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_needles_lie_where_they_are_said_to(task, depth):
    encode = tokenizer().encode
    haystack = encode("lorem ipsum dolor sit amet " * 40)
    example = needles.make(task, encode, haystack, 900, depth, random.Random(3))
    assert len(example.prompt) == 900
    text = tokenizer().decode(example.prompt)
    positions = [needle.position for needle in example.needles]
    assert positions == sorted(positions)
    for needle in example.needles:
        answer = tokenizer().decode(needle.answer).strip(', "')
        if needle.position == needle.end:  # the text as a whole decides
            assert text.count(answer) > 5
            continue
        hidden = tokenizer().decode(example.prompt[needle.position : needle.end])
        assert answer in hidden
        most = 3 if task == "RULER variable tracking" else 2
        assert (
            text.count(answer) <= most or task == "facts"
        )  # the pass key is said twice, nothing gives it away elsewhere
    if depth == 0.0:
        several = ("RULER multi-key", "RULER multi-value", "key-value", "facts")
        assert min(positions) == 0 or task in (*several, "RULER common words")


@pytest.mark.parametrize("task", ["RULER multi-key 2", "RULER multi-key 3"])
@pytest.mark.parametrize("seed", range(5))
def test_a_haystack_of_needles_has_one_that_is_asked_for(task, seed):
    example, text = made(task, seed)
    stated = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text)
    asked = re.search(r"special magic (?:number|uuid) for (\S+) mentioned", text)[1]
    assert len(stated) > 20 and len({key for key, _ in stated}) == len(stated)
    assert dict(stated)[asked] == tokenizer().decode(example.needles[0].answer).strip()
    assert text.count("One of") in (len(stated), len(stated) + 1)  # all whole, but for the first


@pytest.mark.parametrize("seed", range(5))
def test_the_words_that_are_asked_for_are_the_most_frequent(seed):
    for task, pattern, several in (("RULER common words", r"\d\. (\w+)", 1), ("RULER frequent words", r" (\w{6})", 3)):
        example, text = made(task, seed)
        found = Counter(re.findall(pattern, text.rpartition("\n")[0])).most_common(several + 1)
        answers = [tokenizer().decode(needle.answer).strip(" ,") for needle in example.needles]
        assert answers == [word for word, _ in found[:several]] and found[several - 1][1] > 1.5 * found[several][1]
        assert {needle.place(2400, 24, 8) for needle in example.needles} == {"the whole text"}


@pytest.mark.parametrize("recent", [0, 400])
@pytest.mark.parametrize("task", ["RULER multi-query", "RULER variable tracking"])
def test_parts_that_are_asked_for_in_turn(task, recent):
    for seed in range(5):
        example, text = made(task, seed, recent=recent)
        written = [tokenizer().decode(needle.answer).strip(" ,") for needle in example.needles]
        if task == "RULER multi-query":
            keys = re.search(r"for (\w+), (\w+) and (\w+) mentioned", text).groups()
            assert written == [re.search(rf"numbers for {key} is: (\d+)", text)[1] for key in keys]
        else:
            value = re.search(r"assigned the value (\d+)", text)[1]
            chain = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", text)
            assert written == [name for name, _ in chain]
            assert [given for _, given in chain] == [value, *written[:-1]]
        assert min(needle.position for needle in example.needles) >= (1700 if recent else 1000)


@pytest.mark.parametrize(
    "right, of, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_wilson(right, of, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, for the last."""
    assert needles.wilson(right, of) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("position", "end", "place"),
    [
        (0, 8, "sink"),
        (0, 9, "edge of the sinks"),
        (7, 990, "edge of the sinks"),
        (8, 9, "evicted, up to 2,048 back"),
        (464, 474, "evicted, up to 512 back"),
        (940, 960, "evicted, up to 512 back"),
        (960, 976, "evicted, up to 512 back"),
        (960, 977, "edge of the window"),
        (300, 310, "evicted, up to 2,048 back"),
        (975, 990, "edge of the window"),
        (976, 990, "window"),
    ],
)
def test_places(position, end, place):
    assert needles.Needle(position, end, [1]).place(1000, 24, 8) == place
    assert needles.Needle(20, 30, [1]).place(100_000, 24, 8) == "evicted, further back"
    assert needles.Needle(5, 12, [1]).place(32, 24, 8) == "window"  # all of it in sinks and window
    assert needles.Needle(5, 12, [1]).place(33, 24, 8) == "edge of the sinks"


@pytest.mark.parametrize("task", sorted(needles.TASKS.keys() - {"RULER common words", "RULER frequent words"}))
@pytest.mark.parametrize("depth", [0.0, 0.7, 1.0])
def test_needles_that_are_all_evicted(task, depth):
    encode = tokenizer().encode
    haystack = encode("lorem ipsum dolor sit amet " * 60)
    for seed in range(5):
        rng = random.Random(seed)
        example = needles.make(task, encode, haystack, 1400, depth, rng, evicted=(150, 8), begin=[1, 2])
        assert example.prompt[:2] == [1, 2] and len(example.prompt) == 1400
        places = {needle.place(1400, 150, 8) for needle in example.needles}
        # sentences that fill a text begin where they begin
        most = {"edge of the sinks", "sink"} if task in needles.HAYSTACKS and depth == 0.0 else set()
        assert {place for place in places - most if not place.startswith("evicted")} == set()
        with pytest.raises(ValueError, match="does not fit"):
            needles.make(task, encode, haystack, 300, depth, rng, evicted=(290, 8))


def test_prompts_side_by_side_are_scored_as_alone():
    model, encode = small(), tokenizer().encode
    haystack = encode("lorem ipsum dolor sit amet " * 20)
    tasks = ("pass key", "RULER multi-value", "facts")
    examples = [needles.make(task, encode, haystack, 300, 0.4, random.Random(1)) for task in tasks]
    for own, example in zip(needles.score_all(model, examples, 70), examples, strict=True):
        for together, alone in zip(own, needles.score(model, example, 300), strict=True):
            assert together.loss == pytest.approx(alone.loss, rel=1e-4) and together.answer == alone.answer
    examples[0].prompt.pop()
    with pytest.raises(ValueError, match=r"prompts of \[299, 300\] tokens"):
        needles.score_all(model, examples, 70)


def test_a_needle_can_be_put_into_the_window():
    encode, haystack = tokenizer().encode, tokenizer().encode("lorem ipsum " * 200)
    for seed in range(10):
        example = needles.make("pass key", encode, haystack, 800, 0.0, random.Random(seed), recent=200)
        assert example.needles[0].position >= 800 - 200 - 100
    with pytest.raises(ValueError, match="does not fit"):
        needles.make("pass key", encode, haystack, 30, 0.0, random.Random(0))


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_scores_are_those_of_greedy_decoding(chunk):
    model = small()
    encode, haystack = tokenizer().encode, tokenizer().encode("lorem ipsum " * 40)
    example = needles.make("RULER multi-value", encode, haystack, 400, 0.3, random.Random(0))
    answer = [token for needle in example.needles for token in needle.answer]
    with torch.no_grad():
        logits = model(torch.tensor([example.prompt + answer[:-1]])).logits[0, -len(answer) :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    scored = needles.score(model, example, chunk)
    total = sum(needle.loss * len(needle.answer) for needle in scored) / len(answer)
    assert total == pytest.approx(float(expected), rel=1e-4)
    written = model.generate(torch.tensor([example.prompt]), max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    example.needles = [needles.Needle(0, 5, written), needles.Needle(9, 15, [(written[0] + 1) % 256])]
    assert [needle.correct for needle in needles.score(model, example, chunk)] == [True, False]


def test_a_needle_outside_the_window_cannot_reach_it():
    model = small()
    encode, haystack = tokenizer().encode, tokenizer().encode("lorem ipsum " * 60)
    pair = [needles.make("pass key", encode, haystack, 500, 0.3, random.Random(seed)) for seed in (0, 1)]
    pair[1].needles[0].answer = pair[0].needles[0].answer
    losses = {}
    for arm in arms.arms_of(model):
        with arms.use_arm(model, arm):
            losses[arm] = [needles.score(model, example, 64)[0].loss for example in pair]
    # two layers hand on what lies up to two windows back, the needle lies farther
    assert losses["window"][0] == pytest.approx(losses["window"][1], abs=1e-6)
    assert abs(losses["full"][0] - losses["full"][1]) > 1e-6 and abs(losses["memory"][0] - losses["memory"][1]) > 1e-6
