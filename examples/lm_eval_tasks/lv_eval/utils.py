"""LV-Eval (arXiv 2402.05136): records and scores of its eleven data sets.

The scores follow the benchmark's public code, which differs from its paper in one point: words of the blacklist do not
count as recalled keywords, but they do count in the F1 of the answer. Only the first of several answers is compared.
"""

import runpy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_folder = Path(__file__).parents[1]
scores = SimpleNamespace(**runpy.run_path(str(_folder / "text_scores.py")))
files = SimpleNamespace(**runpy.run_path(str(_folder / "records.py")))

COMMON_ENGLISH, COMMON_CHINESE = (
    frozenset(Path(__file__).with_name(f"common_{u}.txt").read_text(encoding="utf-8").split())
    for u in ("english", "chinese")
)
"""Words that are no keywords, as the benchmark lists them."""
LEAST_ENGLISH, LEAST_CHINESE = 0.2, 0.4
"""The share of keywords that an answer needs."""


def records(name: str, level: str = "128k", data: str | None = None, **_: Any) -> dict[str, Any]:
    """One data set.

    Args:
        name: such as ``cmrc_mixup``.
        level: its length, ``16k``, ``32k``, ``64k``, ``128k`` or ``256k``.
        data: a folder with ``lv_eval/cmrc_mixup_128k.jsonl`` and the like; None for the hub.
    """
    found = files.load(f"lv_eval/{name}_{level}", data, "infini-ai/LVEval", archive=f"{name}.zip")
    kept = ("input", "context", "answers", "answer_keywords")
    return files.as_test_split([{key: record.get(key) for key in kept} for record in found])


def english(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of English words."""
    return {"score": scores.f1(scores.english_words(results[0]), scores.english_words(doc["answers"][0]))}


def chinese(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of Chinese words."""
    return {"score": scores.f1(scores.chinese_words(results[0]), scores.chinese_words(doc["answers"][0]))}


def english_keywords(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of English words, or 0 if the answer recalls too few keywords."""
    words, keywords = scores.english_words, doc["answer_keywords"]
    enough = not keywords or recall(results[0], keywords, words, COMMON_ENGLISH) >= LEAST_ENGLISH
    return english(doc, results) if enough else {"score": 0.0}


def chinese_keywords(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of Chinese words, or 0 if the answer recalls too few keywords; those of the answer if none are given."""
    words, keywords = scores.chinese_words, doc["answer_keywords"] or doc["answers"][0]
    enough = recall(results[0], keywords, words, COMMON_CHINESE) >= LEAST_CHINESE
    return chinese(doc, results) if enough else {"score": 0.0}


def recall(answer: str, keywords: str, words: Callable[[str], Sequence[str]], common: frozenset[str]) -> float:
    """The share of keywords in an answer; common words are in no answer, but they are among the keywords."""
    wanted = words(keywords)
    found = Counter(words(answer)) & Counter(wanted)
    return sum(n for word, n in found.items() if word not in common) / len(wanted) if wanted else 0.0


def chinese_rouge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L of Chinese words that are not common ones."""

    def telling(text: str) -> str:
        pieces = scores.cut(" ".join(scores.cut(text)))  # twice, as the benchmark does
        return " ".join(word for word in map(scores.plain_chinese, pieces) if word not in COMMON_CHINESE)

    return {"score": scores.rouge_l(telling(results[0]), telling(doc["answers"][0]))}
