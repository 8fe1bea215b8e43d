"""Wordings of facts: complete, in several forms, and none of those that the tests of recall use."""

import random
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib")
import fact_values  # noqa: E402
import facts  # noqa: E402
import needle_tasks  # noqa: E402
import needles  # noqa: E402


def test_some_questions_are_answered_by_a_whole_sentence():
    for name, least in (("secret", 0.14), ("constant", 0.14), ("chain", 0.14)):
        invented = [u for seed in range(400) for u in facts.invent(name, random.Random(seed), set())]
        asked = [text.partition(facts.MARK)[0] for u in invented for _, text in u.questions]
        asks = [re.escape(text).replace(r"\{k\}", ".+") for text in facts.KINDS[name].asks]
        whole = [text for text in asked if re.match(rf"\s*({'|'.join(asks)}) (?!Answer: )\S", text)]
        assert least < len(whole) / len(asked) < 0.27, name


def test_wordings_of_each_kind():
    for name, kind in facts.KINDS.items():
        assert min(len(set(kind.statements)), len(set(kind.sentences)), len(set(kind.sentences + kind.asks))) >= 5, name
        for text in (*kind.statements, *kind.sentences, *kind.asks):
            assert "{k}" in text or "{K}" in text, text
        for text in (*(kind.seconds or kind.statements), *kind.sentences, *kind.seconds):
            assert text.count("{v}") == 1, text
        if kind.seconds:
            assert len(set(kind.seconds)) >= 5
            assert all("{p}" in text for text in (*kind.statements, *kind.seconds))
            assert not any("{v}" in text for text in kind.statements)
    assert len(set(facts.LISTED.sentences)) >= 5 and len({form["row"] for form in facts.LISTS}) >= 5


def phrases(text, size=4):
    """All runs of so many words, without case and punctuation; ``#`` stands for numbers, also hexadecimal."""
    found = ["#" if re.search(r"\d|^[a-f]{4,}$", word) else word for word in re.findall(r"[a-z0-9]+", text.lower())]
    return {run for run in zip(*(found[i:] for i in range(size)), strict=False) if set(run) != {"#"}}


def texts_of_the_tests():
    """What the tests of recall hide and ask."""
    for make in needles.TASKS.values():
        for seed in range(200):
            parts, question = make(random.Random(seed))
            yield from (text for text, _ in parts)
            yield question + "".join(answer for _, answer in parts if answer)


def test_no_wording_of_the_tests_of_recall():
    tested = set().union(*map(phrases, texts_of_the_tests()))
    assert ("the", "special", "magic", "number") in tested and ("the", "pass", "key", "is") in tested
    assert ("value", "of", "the", "key") in tested and ("went", "to", "the", "kitchen") in tested
    trained = set()
    for name in facts.NAMES:
        for seed in range(400):
            for fact in facts.invent(name, random.Random(seed), set()):
                for text in (*fact.statements, *(question for _, question in fact.questions)):
                    trained |= phrases(text.replace(facts.MARK, ""))
    assert len(trained) > 10_000
    of_any_question = {(word, "what", "is", "the") for word in ("q", "question", "user")}
    assert trained & tested <= of_any_question | {("what", "is", "the", "code")}
    wordings = [text for kind in facts.KINDS.values() for text in (*kind.statements, *kind.sentences, *kind.asks)]
    wordings += [
        *facts.LISTED.sentences,
        *facts.LISTED.asks,
        *facts.FRAMES,
        *facts.REPEATS,
        *facts.TITLES,
    ]
    assert not set().union(*map(phrases, wordings)) & tested


def test_no_key_of_the_tests_of_recall():
    tested = {word.lower() for word in (*needle_tasks.WORDS, *needle_tasks.PEOPLE, *needle_tasks.ROOMS)}
    lists = list(fact_values.WORDS.values())
    assert len(lists) > 10
    trained = {word for words in lists for text in words for word in re.findall("[a-z]+", text.lower())}
    for name in facts.NAMES:
        for seed in range(300):
            for fact in facts.invent(name, random.Random(seed), set()):
                for text in (*fact.statements, *(question for _, question in fact.questions)):
                    trained |= set(re.findall("[a-z]+", text.lower()))
    assert "falcon" in trained and "lund" in trained
    of_any_question = {(word, "what", "is", "the") for word in ("q", "question", "user")}
    assert trained & tested <= of_any_question | {("what", "is", "the", "code")}
