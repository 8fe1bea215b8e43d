"""How InfiniteBench (arXiv 2402.13718) scores answers, as its public code does it.

Each function takes a record and the answers of the harness, of which it reads the first, and returns ``score``.
"""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

scores = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "text_scores.py")))

LETTERS = "ABCD"


def first_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Retrieve.PassKey, Retrieve.Number: the first digits of the answer are those that were hidden."""
    digits = re.search(r"[0-9]+", results[0])
    return _right(digits is not None and digits[0] == doc["answer"][0])


def word(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Retrieve.KV: the value is a word of the answer."""
    return _right(doc["answer"][0] in _words(results[0]))


def name(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """En.Dia: the first of the names is a word of the answer, in any case."""
    return _right(doc["answer"][0] in [u.upper() for u in _words(results[0])])


def last_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Code.Run: the last word of the answer is the value."""
    words = re.sub("[\\n.`'\":]", " ", results[0]).split()
    return _right(bool(words) and _number(words[-1]) == int(doc["answer"][0]))


def found_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Math.Find: the first number of the answer, without a sign."""
    found = re.search(r"[0-9]+\.[0-9]+|[0-9]+", results[0])
    return _right(found is not None and float(found[0]) == float(doc["answer"][0]))


def leading_numbers(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Math.Calc: the share of intermediate values before the first wrong one; signs are not read."""
    given = [int(u) for u in re.findall(r"[0-9]+", results[0])]
    values = [int(u) for u in doc["answer"]]
    right = 0
    while right < min(len(given), len(values)) and given[right] == values[right]:
        right += 1
    return {"score": right / len(values)}


def choice(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """En.MC: the letter that the answer begins with, else the one after a phrase, else the first that stands alone."""
    answer, right = results[0].strip(), _right_answers(doc)
    if answer[:1] and answer[0] in LETTERS:
        return _right(answer[0] in right)
    if answer in right:
        return _right(True)
    words = re.sub("[\\n\"'.,?!{}]", " ", answer).split()
    plain = " ".join(words)
    for phrase in ("answer is:", "answer:", "answer is", "option is"):
        if phrase in plain:
            return _right(plain.split(phrase, 1)[1][1:].startswith(tuple(right)))
    return _right(next((u for u in words if u in LETTERS), None) in right)


def faulty_function(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Code.Debug: the answer begins with the letter, or a phrase comes before the letter or the function's name."""
    answer, right = results[0].strip(), _right_answers(doc)
    letter = right[1]
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return _right(True)
    plain = re.sub(" +", " ", re.sub("[\\n`'\"*-]|[Oo]ption", " ", answer))
    for phrase in ("answer is:", "is:", "answer:", "correct option is:"):
        if phrase in plain:
            return _right(plain.split(phrase, 1)[1][1:].startswith((letter, right[0])))
    return _right(False)


def english_f1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """En.QA: F1 of words, the best over the answers."""
    given = scores.english_words(results[0])
    return {"score": max(scores.f1(given, scores.english_words(target)) for target in doc["answer"])}


def chinese_f1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Zh.QA: F1 of characters, the best over the answers."""
    given = scores.plain_chinese(results[0])
    return {"score": max(scores.f1(given, scores.plain_chinese(target)) for target in doc["answer"])}


def summary(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """En.Sum: ROUGE-Lsum, the best over the answers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"])
    return {"score": scorer.score_multi(doc["answer"], results[0])["rougeLsum"].fmeasure}


def _right(is_right: bool) -> dict[str, float]:
    return {"score": float(is_right)}


def _right_answers(doc: dict[str, Any]) -> list[str]:
    """The text of the right option, and its letter."""
    text = doc["answer"][0]
    return [text, LETTERS[doc["options"].index(text)]]


def _words(text: str) -> list[str]:
    return re.sub("[\\n:\"'.,?!{}]", " ", text).split()


def _number(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None
