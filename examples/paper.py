r"""Reproduce the paper: LV-Eval, InfiniteBench and LongBench with full attention, the window alone, and the memory.

    python examples/paper.py --model Qwen/Qwen2.5-3B-Instruct \
        --adapter ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B --output paper
    python examples/paper.py --random-weights --data tests/fixtures --window 112 --sinks 16 --output tiny

Prompts, metrics, truncation and windows are those of the AHN paper's evaluation (``protocols.py``). Records come from
the hub, or from a folder (``--data``). Each task is saved when it ends, and the same command continues where it
stopped. Writes ``results.md``, ``results.json`` and the answers.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _chat import SMALL, random_model
from _common import (
    Help,
    compressor_names,
    count,
    describes_itself,
    find_adapter,
    give_memory,
    positive,
    refuse_model,
    user_errors,
)
from arms import arms_of, positioned, use_arm
from protocols import PAPER, PROTOCOLS, Protocol, find
from smollm2 import load_causal_lm
from transformers import LlamaConfig

PACKAGES = ("ahn-layers", "torch", "transformers", "lm_eval")
RULER_LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
Results = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Results:
    """Run what was asked for; returns what is written to ``results.json``."""
    options = parse(arguments)
    with user_errors("paper"):
        tasks = check(options)
        adapter = find_adapter(options.adapter)
        model, tokenizer = load(options)
        give_memory(model, adapter, compressor=options.compressor)
        if options.sink_positions is None and (adapter is None or not describes_itself(adapter)):
            options.sink_positions = "absolute"
        results = begin(options, model, tokenizer)
        with positioned(model, options.sink_positions) if options.sink_positions else nullcontext():
            run(tasks, model, tokenizer, options, results)
    print(f"\n{table(results)}\n\n{options.output}/results.md, results.json, answers")
    return results


def check(options: argparse.Namespace) -> dict[str, Protocol]:
    """The tasks; whatever can be wrong with a command line is found before a model is loaded.

    Raises:
        ValueError: if something is.
        ImportError: if the harness is not installed.
    """
    tasks = find(options.tasks)
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-evaluation-harness is not installed. Install the extra: pip install '.[paper]'.")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output}: expected a folder, and this is a file.")
    if options.random_weights:
        refuse_model(options.model)
    if options.random_weights and any(u.folder == "ruler" for u in tasks.values()):
        raise ValueError("--random-weights: RULER needs a tokenizer in a folder or on the hub. Name a --model.")
    if options.data is not None:
        if not options.data.is_dir():
            raise ValueError(f"--data {options.data}: no such folder.")
        missing = [str(u) for task, protocol in tasks.items() if (u := protocol.missing(task, options.data))]
        if missing and options.tasks_given:
            raise ValueError(f"--data {options.data}: no file {', '.join(missing)}. Leave the task out of --tasks.")
        tasks = {task: u for task, u in tasks.items() if not u.missing(task, options.data)}
        if not tasks:
            folders = ", ".join(dict.fromkeys(u.folder for u in PROTOCOLS.values() if u.folder != "ruler"))
            raise ValueError(f"--data {options.data}: none of the folders {folders} with the records of --tasks.")
    return tasks


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    dtype = getattr(torch, options.dtype)
    if not options.random_weights:
        return load_causal_lm(options.model, dtype, options.device)
    model, tokenizer = random_model(LlamaConfig(**SMALL, num_key_value_heads=2))
    return model.to(options.device, dtype), tokenizer


def begin(options: argparse.Namespace, model: Any, tokenizer: Any) -> Results:
    """The results to go on with: those in the output folder, or new ones.

    Raises:
        ValueError: if the folder holds results of other settings.
    """
    names = ("model", "adapter", "compressor", "window", "sinks", "sink_positions", "limit", "ruler_length", "dtype")
    settings = {name: getattr(options, name) for name in names} | {"data": options.data and str(options.data)}
    settings["chat_template"] = tokenizer.chat_template is not None
    path = options.output / "results.json"
    if path.exists():
        results: Results = json.loads(path.read_text())
        if results["settings"] != settings:
            changed = [name for name in settings if results["settings"].get(name) != settings[name]]
            raise ValueError(f"{path} holds results of other settings ({', '.join(changed)}). Choose another --output.")
        return results
    (options.output / "answers").mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    trained = model.hippocampus.compressor if options.adapter else "untrained: it adds nothing to the window"
    return {"settings": settings, "memory": trained, "device": device, "versions": versions, "scores": {}}


def run(tasks: dict[str, Protocol], model: Any, tokenizer: Any, options: argparse.Namespace, results: Results) -> None:
    """Every task in every arm, saved one by one."""
    from harness import load_task, run_task

    scores, arms = results["scores"], options.arms or list(arms_of(model))
    left = [(task, arm) for task in tasks for arm in arms if arm not in scores.get(task, {})]
    metadata = {"max_seq_lengths": [options.ruler_length], "tokenizer": tokenizer.name_or_path}
    metadata |= {} if options.data is None else {"data": str(options.data)}
    start, loaded = time.monotonic(), (None, None)
    for done, (name, arm) in enumerate(left):
        protocol, began = tasks[name], time.monotonic()
        if loaded[0] != name:
            loaded = (name, load_task(name, metadata, protocol.spec(name, options.data)))
        window = (options.window or protocol.window_size, count_of(options.sinks, protocol.num_sinks))
        chat = protocol.chat and name not in protocol.plain and tokenizer.chat_template is not None
        with use_arm(model, arm, window):
            score = run_task(loaded[1], model, tokenizer, protocol, chat, options.limit)
        found = dataclasses.asdict(score)
        lines = (json.dumps(u, ensure_ascii=False) for u in found.pop("answers"))
        (options.output / "answers" / f"{name}-{arm}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found |= {"error": score.error if math.isfinite(score.error) else None, "window": list(window), "chat": chat,
                  "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
        scores.setdefault(name, {})[arm] = found
        save(results, options.output)
        remaining = (time.monotonic() - start) / (done + 1) * (len(left) - done - 1)
        print(f"[{done + 1}/{len(left)}] {name}, {arm}: {score.mean:.2f}, {score.prompts} prompts of up to "
              f"{score.longest:,} tokens, {found['seconds']:.0f} s; about {remaining / 60:.0f} min left")  # fmt: skip
        if score.longest <= sum(window):
            print(f"  no prompt is longer than the window ({sum(window):,} tokens): every arm is the base model here")


def count_of(given: int | None, otherwise: int) -> int:
    """A count that may be zero, or what stands for none given."""
    return otherwise if given is None else given


def save(results: Results, folder: Path) -> None:
    """Write the results as JSON and as a table."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(table(results) + "\n")


def table(results: Results) -> str:
    """The scores in Markdown, with the mean of each benchmark over its tasks."""
    scores = results["scores"]
    arms = list(dict.fromkeys(arm for found in scores.values() for arm in found))
    head = ["task", *arms, "prompts", "longest", "cut"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for protocol in PROTOCOLS.values():
        tasks = [task for task in protocol.files if task in scores]
        for task in tasks:
            last = list(scores[task].values())[-1]
            cells = [_cell(scores[task].get(arm)) for arm in arms]
            counts = [str(last["prompts"]), f"{last['longest']:,}", str(last["was_cut"])]
            lines.append(f"| {' | '.join([task, *cells, *counts])} |")
        if len(tasks) > 1:
            both = [[scores[task][arm]["mean"] for task in tasks if arm in scores[task]] for arm in arms]
            means = [f"**{sum(u) / len(u):.2f}**" if len(u) == len(tasks) else "" for u in both]
            lines.append(f"| **mean of {len(tasks)} tasks** | {' | '.join([*means, '', '', ''])} |")
    return "\n".join(lines)


def _cell(found: Results | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.2f}" + ("" if found["error"] is None else f" ± {found['error']:.2f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    add("--random-weights", action="store_true", help="a tiny model with random weights: a rehearsal, no scores")
    add("--adapter", help="trained memory: folder, file or hub id; default: none, an untrained memory adds nothing")
    add("--compressor", choices=compressor_names(), help="of released weights (default: GatedDeltaNet)")
    add("--window", type=positive, help="tokens kept without loss (default: the paper's for each benchmark)")
    add("--sinks", type=count, help="first tokens, always kept (default: the paper's, 128)")
    add("--sink-positions", choices=["trained", "streaming", "absolute"],
        help="distance at which sinks are shown (default: the adapter's, else absolute as in the paper)")  # fmt: skip
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(PROTOCOLS)}, or single tasks (default: {', '.join(PAPER)})",
    )
    add("--arms", nargs="+", choices=["full", "window", "compressor", "slots", "memory"], help="default: all it has")
    add("--limit", type=positive, help="prompts of each task (default: all)")
    add("--data", type=Path, help="folder with lv_eval/, infinite_bench/, longbench/ (default: the hub)")
    add("--ruler-length", type=int, default=131_072, choices=RULER_LENGTHS, help="of its prompts (default: 131072)")
    add("--device", default="cuda" if gpu else "cpu", help="where it runs: cpu, cuda, cuda:1, ...")
    add(
        "--dtype",
        default="bfloat16" if gpu else "float32",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the model",
    )
    add("--output", type=Path, required=True, help="folder for results.md, results.json, answers")
    options = parser.parse_args(arguments)
    options.tasks_given, options.tasks = options.tasks is not None, options.tasks or list(PAPER)
    return options


if __name__ == "__main__":
    main()
