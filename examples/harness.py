"""Run one task of lm-evaluation-harness on a loaded model, with its prompts cut as a benchmark cuts them."""

import json
import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from protocols import TASKS, Protocol

ROOM = 4096
"""Tokens of a prompt beyond ``Protocol.longest``: of the chat template, and of rounding at the cut."""


class CutPrompts(HFLM):
    """A model of the harness that cuts long prompts before the chat template is put around them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        protocol: how long a prompt may be, and what is cut.
        new_tokens: the longest answer of the task.
        chat: whether the prompts go through the chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, protocol: Protocol, new_tokens: int, chat: bool) -> None:
        room = protocol.longest + new_tokens + ROOM
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=room, enable_thinking=False)
        self.protocol, self.new_tokens, self.chat = protocol, new_tokens, chat
        self.longest, self.was_cut = 0, 0

    def cut(self, prompt: str) -> str:
        """A prompt of at most ``protocol.longest`` tokens."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if len(ids) <= self.protocol.longest:
            return prompt
        self.was_cut += 1
        decode = self.tokenizer.decode
        if self.protocol.cut == "beginning":
            return decode(ids[-(self.protocol.longest - self.new_tokens) :], skip_special_tokens=True)
        half = self.protocol.longest // 2
        return "".join(decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat template around a prompt that has been cut."""
        turns = [{**u, "content": self.cut(u["content"])} if u["role"] == "user" else u for u in chat_history]
        return super().apply_chat_template(turns, add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers; without a chat template the prompts are cut here."""
        if not self.chat:
            requests = [replace(u, arguments=(self.cut(u.args[0]), *u.args[1:])) for u in requests]
        for request in requests:
            self.longest = max(self.longest, len(self.tok_encode(request.args[0])))
        return super().generate_until(requests, disable_tqdm)


@dataclass(frozen=True)
class Score:
    """What a task gave.

    Attributes:
        mean: over the prompts, 0 to 100.
        error: standard error of the mean, of the prompts; infinite for one.
        prompts: how many were scored.
        longest: tokens of the longest prompt.
        was_cut: how many prompts were cut.
        answers: by prompt, the answer, the answer wanted, and the score.
    """

    mean: float
    error: float
    prompts: int
    longest: int
    was_cut: int
    answers: list[dict[str, Any]]


@cache
def _manager(of_the_harness: bool, metadata: str) -> TaskManager:
    """What finds task files; those of the harness itself are many."""
    return TaskManager(include_path=str(TASKS), include_defaults=of_the_harness, metadata=json.loads(metadata))


def load_task(name: str, metadata: dict[str, Any], spec: str | dict[str, Any] | None = None) -> Any:
    """A task of the harness with its records.

    Args:
        name: the task.
        metadata: what the functions that load records take: ``data``, ``max_seq_lengths``, ``tokenizer``.
        spec: what ``Protocol.spec`` says of it; its name by default.

    Raises:
        OSError: if its records cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = any(TASKS.rglob(f"{name}.yaml"))
    try:
        (task,) = _manager(not ours, json.dumps(metadata)).load([spec or name])["tasks"].values()
    except Exception as error:  # a network fails in many ways, and its errors share no base class
        raise OSError(f"{name}: no records ({error}). Name a folder that has them by --data.") from None
    task.set_config(key="num_fewshot", value=0)
    return task


def run_task(task: Any, model: Any, tokenizer: Any, protocol: Protocol, chat: bool, limit: int | None) -> Score:
    """Answer and score the prompts of a task, greedily, one after another.

    Args:
        task: as ``load_task`` returned it.
        model: as it is now: in one of its arms.
        tokenizer: its tokenizer.
        protocol: of the task.
        chat: whether the prompts go through the chat template.
        limit: how many prompts; None for all.

    Raises:
        ValueError: if the task has no prompts, or none of its metrics has a value.
    """
    harness = CutPrompts(model, tokenizer, protocol, task.config.generation_kwargs["max_gen_toks"], chat)
    tasks = {"tasks": {task.config.task: task}, "groups": {}, "group_map": {}}
    out = lm_eval.evaluate(
        harness, tasks, limit=limit, bootstrap_iters=0, apply_chat_template=chat, verbosity="ERROR"
    )  # and not simple_evaluate, which lists all installed packages each time
    (samples,) = out["samples"].values()
    metric = next((u for u in _metrics(task) if any(s[u] != -1 for s in samples)), None)  # RULER: -1 at other lengths
    if metric is None:
        raise ValueError(f"{task.config.task}: no prompts.")
    answers = [
        {
            "prompt": s["doc_id"],
            "answer": s["filtered_resps"][0],
            "wanted": s["target"],
            "score": 100 * float(s[metric]),
        }
        for s in samples
    ]
    values = [u["score"] for u in answers]
    mean = sum(values) / len(values)
    spread = sum((u - mean) ** 2 for u in values)
    error = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else math.inf
    return Score(mean, error, len(values), harness.longest, harness.was_cut, answers)


def _metrics(task: Any) -> list[str]:
    names = [u["metric"] for u in task.config.metric_list]
    return ["score"] if "score" in names else names
