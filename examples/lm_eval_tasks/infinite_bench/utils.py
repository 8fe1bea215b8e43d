"""InfiniteBench (arXiv 2402.13718): records and prompts of its twelve tasks, and the AHN paper's score for two of them.

The prompts are the benchmark's for open models, which it gives without a chat template. The harness has eleven of the
tasks under ``infinitebench``, with the benchmark's prompts for GPT-4.
"""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_folder = Path(__file__).parents[1]
scores = SimpleNamespace(**runpy.run_path(str(_folder / "text_scores.py")))
files = SimpleNamespace(**runpy.run_path(str(_folder / "records.py")))

BREAKS = (".assistant", "\n\nQuestion", "</s>", "(Document", "\n\nAnswer", "(Passage")
"""Where the AHN paper's evaluation cuts an answer."""


def records(name: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """One task; its answers, numbers too, as a list of texts.

    Args:
        name: such as ``longbook_qa_eng``.
        data: a folder with ``infinite_bench/longbook_qa_eng.jsonl`` and the like; None for the hub.
    """
    found = files.load(f"infinite_bench/{name}", data, "xinrongzhang2022/InfiniteBench")
    return files.as_test_split([
        {
            "context": record["context"],
            "input": record.get("input") or "",
            "answer": [str(u) for u in _flat(record["answer"])],
            "options": [str(u) for u in record.get("options") or []],
        }
        for record in found
    ])  # fmt: skip


def _flat(answer: Any) -> list[Any]:
    """A single answer, a list, or a list in a list, as a list."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer if isinstance(answer, list) else [answer]


def code_run_prompt(doc: dict[str, Any]) -> str:
    """Ask for the value of the call that the question names."""
    call = re.search(r"func_[0-9]+\(-?[0-9]+\)", doc["input"])
    if call is None:
        raise ValueError(f"{doc['input']!r}: expected a call such as func_1(-2).")
    function = call[0].partition("(")[0]
    return (
        f"There is a function called {function} in the following Python code.\n\n{doc['context']}\n\n"
        f"Please compute the exact value of {call[0]}. The value of {call[0]} is"
    )


def math_find_prompt(doc: dict[str, Any]) -> str:
    """Ask for the number before and after the list."""
    target = re.search(r"The .+ of", doc["input"])
    if target is None:
        raise ValueError(f"{doc['input']!r}: expected a question such as 'The largest number of the list ...'.")
    return f"What is {target[0].lower()[:-3]} in the following list?\n\n{doc['context']}\n\n{doc['input']}"


def paper_rouge_english(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L, the best over the answers: what the AHN paper's evaluation computes."""
    answer = _before_breaks(results[0])
    return {"score": max(scores.rouge_l(answer, target) for target in doc["answer"])}


def paper_rouge_chinese(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The same on words as ``jieba`` cuts them."""
    answer = " ".join(scores.cut(_before_breaks(results[0])))
    return {"score": max(scores.rouge_l(answer, " ".join(scores.cut(target))) for target in doc["answer"])}


def _before_breaks(answer: str) -> str:
    for mark in BREAKS:
        answer = answer.split(mark)[0]
    return answer.strip()
