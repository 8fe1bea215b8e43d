"""The benchmarks of the AHN paper (arXiv 2510.07318), as its public evaluation runs them: window, prompts, tasks.

``paper.py`` runs them. LV-Eval and InfiniteBench are task files in ``lm_eval_tasks``; LongBench and RULER are those of
lm-evaluation-harness.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TASKS = Path(__file__).parent / "lm_eval_tasks"


@dataclass(frozen=True)
class Protocol:
    """How one benchmark is run.

    Attributes:
        folder: of its files below ``--data``.
        files: by task, the file that holds its records, without ``.jsonl``; empty if they are made on the spot.
        longest: tokens of a prompt, without chat template.
        cut: what of a longer prompt is left out. Where it is the beginning, room for the new tokens is left as well.
        chat: whether a prompt goes through the chat template.
        plain: tasks whose prompts never do.
        window_size: tokens kept without loss, sinks aside.
        num_sinks: first tokens, always kept.
    """

    folder: str
    files: dict[str, str]
    longest: int
    cut: Literal["middle", "beginning"]
    chat: bool = True
    plain: frozenset[str] = frozenset()
    window_size: int = 32_640
    num_sinks: int = 128

    def spec(self, task: str, data: Path | None) -> str | dict[str, Any]:
        """The task as the harness takes it; LongBench from a folder needs another path of its records."""
        if self.folder != "longbench" or data is None:
            return task
        path = str(data / self.folder / f"{self.files[task]}.jsonl")
        records = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": path}}}
        return {"group": "from a folder", "task": [{"task": task, **records}]}

    def missing(self, task: str, data: Path) -> Path | None:
        """The file of a task, if a folder with data lacks it."""
        path = data / self.folder / f"{self.files[task]}.jsonl"
        return path if self.files[task] and not path.is_file() else None


_LV_EVAL = (
    "hotpotwikiqa_mixup", "loogle_SD_mixup", "loogle_CR_mixup", "loogle_MIR_mixup", "multifieldqa_en_mixup",
    "multifieldqa_zh_mixup", "factrecall_en", "factrecall_zh", "cmrc_mixup", "lic_mixup", "dureader_mixup",
)  # fmt: skip
_INFINITE_BENCH = (
    "passkey", "number_string", "kv_retrieval", "longbook_sum_eng", "longbook_qa_eng", "longbook_choice_eng",
    "longdialogue_qa_eng", "longbook_qa_chn", "code_debug", "code_run", "math_calc", "math_find",
)  # fmt: skip
_LONGBENCH = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
_RULER = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")

PROTOCOLS = {
    "lv_eval": Protocol("lv_eval", {f"lv_eval_{u}": f"{u}_128k" for u in _LV_EVAL}, 256_000, "middle"),
    "infinite_bench": Protocol(
        "infinite_bench", {f"infinite_bench_paper_qa_{u}": f"longbook_qa_{u}" for u in ("eng", "chn")},
        128_000, "beginning",
    ),
    "longbench": Protocol(
        "longbench", {f"longbench_{u}": u for u in _LONGBENCH}, 32_000, "beginning",
        plain=frozenset({"longbench_triviaqa"}), window_size=8064,
    ),
    "ruler": Protocol("ruler", dict.fromkeys((f"niah_{u}" for u in _RULER), ""), 1_048_576, "beginning"),
    # not in the paper: the whole of InfiniteBench, as its authors run open models
    "infinite_bench_all": Protocol(
        "infinite_bench", {f"infinite_bench_{u}": u for u in _INFINITE_BENCH}, 131_072, "middle", chat=False
    ),
}  # fmt: skip
"""By the name that ``--tasks`` takes."""
PAPER = ("lv_eval", "infinite_bench", "longbench")
"""Those that are run by default: tables 2, 3 and 6 of the paper. Table 5 is ``ruler``."""


def find(names: list[str]) -> dict[str, Protocol]:
    """The protocol of each task, for names of benchmarks and of tasks.

    Raises:
        ValueError: if there is no such benchmark or task.
    """
    found: dict[str, Protocol] = {}
    by_task = {task: protocol for protocol in PROTOCOLS.values() for task in protocol.files}
    for name in names:
        if name in PROTOCOLS:
            found |= dict.fromkeys(PROTOCOLS[name].files, PROTOCOLS[name])
        elif name in by_task:
            found[name] = by_task[name]
        else:
            raise ValueError(f"--tasks {name}: expected {', '.join(PROTOCOLS)}, or one of {', '.join(by_task)}.")
    return found
