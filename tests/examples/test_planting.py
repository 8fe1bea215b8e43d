"""Texts with facts to recall: places of values and answers, complete insertions, wordings of their own."""

import importlib
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = 1_000_000
"""Tokens from here on belong to the text; those below were inserted."""


class Words:
    """A tokenizer: words with the space before them, single digits, and single other characters."""

    def __init__(self):
        self.ids, self.pieces = {}, []

    def encode(self, text):
        found = re.findall(r" ?[A-Za-z]+|[\s\S]", text)
        assert "".join(found) == text
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def decode(self, ids):
        return "".join(self.pieces[i] if i < TEXT else f"<{i}>" for i in ids)


@pytest.fixture(autouse=True)
def run_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def module():
    return importlib.import_module("planting")


def made_of():
    """The wordings."""
    return importlib.import_module("facts")


@pytest.fixture
def invented(module, monkeypatch):
    """All facts that were made up, by kind, whether or not they were planted."""
    found, original = [], module.invent

    def invent(name, rng, used):
        found.append((name, original(name, rng, used)))
        return found[-1][1]

    monkeypatch.setattr(module, "invent", invent)
    return found


def text_of(length):
    return torch.arange(TEXT, TEXT + length)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def values_of(text, mark):
    return text.split(mark)[1::2]


@pytest.mark.parametrize(
    "length, nearest", [(128, 0), (129, 0), (228, 50), (528, 200), (1023, 200), (2048, 64), (5000, 1500)]
)
@pytest.mark.parametrize("seed", range(8))
def test_every_answer_is_the_value_that_was_stated_before(module, invented, length, nearest, seed):
    words = Words()
    planted = module.plant(text_of(length), words.encode, seeded(seed), nearest=nearest)
    tokens = planted.tokens.tolist()
    assert planted.tokens.dtype == torch.int64 and len(tokens) == length
    stated = {v.strip() for _, facts in invented for u in facts for v in values_of(u.statements[-1], module.MARK)}
    for asked in planted.asked:
        value, answer = (tokens[slice(*place)] for place in (asked.value, asked.answer))
        assert value == answer
        assert 0 <= asked.value[0] < asked.value[1] <= asked.answer[0] < asked.answer[1] <= length
        assert asked.answer[0] - asked.value[1] >= nearest
        if value[0] < TEXT:
            assert words.decode(value).strip() in stated
    assert planted.asked == sorted(planted.asked, key=lambda asked: asked.answer)


@pytest.mark.parametrize("length, nearest", [(128, 0), (528, 200), (2048, 200), (6000, 64)])
@pytest.mark.parametrize("seed", range(6))
def test_insertions_are_complete_and_nothing_else_of_the_text_changes(module, invented, length, nearest, seed):
    words = Words()
    planted = module.plant(text_of(length), words.encode, seeded(seed), nearest=nearest, copies=(0, 0))
    tokens = planted.tokens.tolist()
    kept = [u for u in tokens if u >= TEXT]
    assert kept == list(range(TEXT, TEXT + len(kept)))
    assert len(kept) >= length // 2
    texts = [text for _, facts in invented for u in facts for text in (*u.statements, *(q for _, q in u.questions))]
    whole = "|".join(re.escape(text.replace(module.MARK, "")) for text in texts)
    for run in filter(None, re.split(r"<\d{7}>", words.decode(tokens))):
        assert re.fullmatch(f"(?:{whole})+", run), run


@pytest.mark.parametrize("seed", range(6))
def test_the_statement_lies_before_the_question_by_the_least_distance(module, invented, seed):
    """All of it, not only its value: what stands between has at least so many tokens."""
    words, nearest = Words(), 150
    planted = module.plant(text_of(3000), words.encode, seeded(seed), nearest=nearest, copies=(0, 0))
    everything, checked = words.decode(planted.tokens.tolist()), 0
    for _, facts in invented:
        for fact in facts:
            stated = [everything.find(text.replace(module.MARK, "")) for text in fact.statements]
            if not fact.questions or -1 in stated:
                continue
            end = max(p + len(t.replace(module.MARK, "")) for p, t in zip(stated, fact.statements, strict=True))
            for _, question in fact.questions:
                found = everything.find(question.replace(module.MARK, ""), end)
                if found >= 0:
                    pieces = re.findall(r"<\d{7}>", everything[end:found])
                    assert len(pieces) >= nearest
                    checked += 1
    assert checked >= 6


@pytest.mark.parametrize("seed", range(6))
def test_repeated_spans(module, seed):
    planted = module.plant(text_of(2000), Words().encode, seeded(seed), facts=(0, 0), copies=(2, 4), nearest=100)
    tokens = planted.tokens.tolist()
    assert len(tokens) == 2000 and 2 <= len(planted.repeated) <= 4
    assert not planted.asked and not planted.answers.any()  # what nobody can foresee is no answer
    rest = list(tokens)
    for copy in reversed(planted.repeated):
        value, answer = (range(first - 7, end) for first, end in (copy.value, copy.answer))
        span = [tokens[i] for i in value]
        assert span == [tokens[i] for i in answer] == list(range(span[0], span[0] + len(span)))
        assert 24 <= len(span) <= 120
        assert answer.start - value.stop >= 100
        del rest[answer.start : answer.stop]
    assert rest == list(range(TEXT, TEXT + len(rest)))


def test_as_many_facts_and_copies_as_asked_for(module, invented):
    words = Words()
    planted = module.plant(text_of(20_000), words.encode, seeded(0), facts=(30, 30), copies=(4, 4))
    asked = sum(bool(u.questions) for _, facts in invented for u in facts)
    assert 30 <= asked <= 32  # the last ones may come with others of the same wording
    questions = sum(len(u.questions) for _, facts in invented for u in facts)
    assert len(planted.asked) == questions and len(planted.repeated) == 4
    nothing = module.plant(text_of(20_000), words.encode, seeded(0), facts=(0, 0), copies=(0, 0))
    assert not nothing.asked and not nothing.repeated


def test_the_generator_decides_everything(module):
    words = Words()
    first, again, other = (module.plant(text_of(1500), words.encode, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens) and first.asked == again.asked
    assert not torch.equal(first.tokens, other.tokens)
    generator = seeded(3)
    module.plant(text_of(1500), words.encode, generator)
    assert not torch.equal(module.plant(text_of(1500), words.encode, generator).tokens, first.tokens)


def test_every_kind_is_planted_and_asked_for_once_to_three_times(module, invented):
    words, kinds, times, others = Words(), set(), set(), 0
    for seed in range(40):
        invented.clear()
        everything = words.decode(module.plant(text_of(4000), words.encode, seeded(seed)).tokens.tolist())
        for name, facts in invented:
            shown = [u for u in facts if u.statements[-1].replace(module.MARK, "") in everything]
            kinds |= {name for u in shown if u.questions}
            times |= {len(u.questions) for u in shown if u.questions and name != "list"}
            others += any(not u.questions for u in shown)
    assert kinds == set(made_of().NAMES)
    assert times == {1, 2, 3}
    assert others > 20


def test_facts_that_only_their_kind_names_are_planted_more_often(module, invented):
    for seed in range(60):
        module.plant(text_of(4000), Words().encode, seeded(seed))
    names = [name for name, _ in invented]
    assert set(made_of().DRAWN) == set(made_of().NAMES)
    assert 0.1 < names.count("secret") / len(names) < 0.2  # 3 of 21, not 1 of 19


def test_every_question_asks_for_the_value_of_its_fact(module):
    for name in made_of().NAMES:
        for seed in range(60):
            facts = module.invent(name, random.Random(seed), set())
            assert any(u.questions for u in facts)
            for fact in facts:
                values = values_of(fact.statements[-1], module.MARK)
                assert len(fact.statements) == (2 if name == "chain" else 1)
                assert all(text[0].isspace() for text in fact.statements)
                for which, question in fact.questions:
                    assert values_of(question, module.MARK) == [values[which]]
                    assert question[0].isspace()
                    assert values[which].strip() not in question.partition(module.MARK)[0]
                assert not re.search(r"\{[kKabpvq]\}", "".join([*fact.statements, *(q for _, q in fact.questions)]))


def test_no_two_statements_of_a_text_contradict_each_other(module, invented):
    for seed in range(30):
        invented.clear()
        module.plant(text_of(4000), Words().encode, seeded(seed))
        stated = []
        for fact in (u for _, facts in invented for u in facts):
            text = fact.statements[0]
            for value in values_of(text, module.MARK):
                text = text.replace(value, "...")
            stated.append(text.replace(module.MARK, "").strip())
        assert len(stated) == len(set(stated)) >= 6


@pytest.mark.parametrize("shape", [(527,), (0,), (2, 600)])
def test_a_text_that_is_too_short(module, shape):
    with pytest.raises(ValueError, match=r"expected one dimension and at least 528 tokens.*Pass a longer text"):
        module.plant(torch.zeros(shape, dtype=torch.long), Words().encode, seeded(0))


def test_crops(module):
    words = Words()
    words.encode("".join(chr(i) for i in range(32, 127)))
    documents = [text_of(3000).int(), text_of(40).int(), text_of(1300).int() + 5000]
    make = lambda seed: module.PlantedCrops(documents, 700, 5, words.encode, nearest=100, copies=(0, 0), seed=seed)
    crops, same, other = make(0), make(0), make(1)
    assert len(crops) == 5
    last = crops[4]["input_ids"]
    items = [same[i]["input_ids"] for i in range(5)]  # in another order
    assert torch.equal(items[4], last) and torch.equal(crops[0]["input_ids"], items[0])
    assert not torch.equal(other[0]["input_ids"], items[0])
    for i, item in enumerate(items):
        assert item.dtype == torch.int64 and item.shape == (700,)
        text = item[item >= TEXT]
        assert 350 <= len(text) < 700 and torch.equal(text, text[0] + torch.arange(len(text)))
        planted = same.planted(i)
        assert torch.equal(planted.tokens, item) and planted.asked
        mask = torch.zeros(700, dtype=torch.bool)
        for asked in planted.asked:
            mask[slice(*asked.answer)] = True
        assert torch.equal(same[i]["answers"], mask) and same[i]["asked"] == planted.asked
    one_place = module.PlantedCrops([text_of(700)], 700, 2, words.encode)
    assert not torch.equal(one_place[0]["input_ids"], one_place[1]["input_ids"])  # other facts in the same text
    with pytest.raises(IndexError):
        crops[5]
    with pytest.raises(ValueError, match="expected at least one stretch of 9000"):
        module.PlantedCrops(documents, 9000, 5, words.encode)


def test_marks_show_values_and_answers(module):
    words = Words()
    planted = module.plant(text_of(1200), words.encode, seeded(5))
    shown, plain = module.marked(planted, words.decode), words.decode(planted.tokens.tolist())
    assert re.sub(r"\[\[\d+(, \d+)*:|\]\]|<<\d+:|(?<=[^>])>>", "", shown) == plain
    for i, asked in enumerate(planted.asked, 1):
        answer = words.decode(planted.tokens[slice(*asked.answer)].tolist())
        assert f"<<{i}:{answer}>>" in shown
        assert re.search(rf"\[\[(\d+, )*{i}(, \d+)*:{re.escape(answer)}\]\]", shown)


def test_the_command_prints_a_text_or_an_error(module, monkeypatch, capsys):
    class Tokenizer(Words):
        def __call__(self, text, **options):
            return SimpleNamespace(input_ids=self.encode(text))

    monkeypatch.setattr(module, "load_tokenizer", lambda name: Tokenizer())
    monkeypatch.setattr(module, "load_text", lambda path: "It was a dark and stormy night. " * 500)
    module.main(["--tokens", "900", "--seed", "2"])
    shown = capsys.readouterr().out
    assert "stormy night" in shown and "[[1" in shown and "<<1:" in shown
    module.main(["--tokens", "900", "--seed", "3"])
    assert capsys.readouterr().out != shown
    with pytest.raises(SystemExit, match="at least 528 tokens"):
        module.main(["--tokens", "100"])
