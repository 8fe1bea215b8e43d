"""Teach a language model to recall what has left its window.

    python examples/learn_to_recall.py
    python examples/learn_to_recall.py --ask examples/adapters/smollm2-135m-instruct-slots    # four minutes on a CPU

Every key/value head of SmolLM2-135M-Instruct keeps some evicted tokens in slots. Which ones, a small network in each
layer learns in three stages: from the attention that tokens will get, from where the model looks facts up, and from the
model's own answers. A fourth (``--slot-steps``) gives the layers that look facts up the slots of the others. Facts are
hidden in the text of Python's reference manual, or in texts of yours (``--text``). Then the model is asked for facts in
other wordings that have left the window: with full attention, with a window that holds as many tokens, and with the
slots.

Writes an adapter and a picture. With ``--ask ADAPTER`` it asks with a memory that is trained already; one comes with
the repository, as in the second command. On a GPU, longer texts and more of them:
``--length 4096 --batch 4 --score-steps 240 --steps 160``. ``--model gemma3`` teaches Gemma 3 270M, see ``gemma3.py``.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import compressor_names, count, device, find_adapter, number, positive, user_errors
from arms import slots_of
from looks import look
from matplotlib.figure import Figure
from needles import Example, make, score
from planting import PlantedCrops
from quickstart import load_text
from smollm2 import load_causal_lm
from stages import answer_groups, find_heads, learn_attention, mean, steps
from texts import read_texts, tokenize
from torch import Tensor
from tqdm import tqdm

from ahn_layers import (
    Compressor,
    SalientSlots,
    adapter_parameters,
    full_attention,
    load_adapter,
    memory_report,
    restore,
    retrofit,
    save_adapter,
    window_only,
)
from ahn_layers.distillation import (
    distillation_loss,
    freeze_base,
    salient_slots,
    set_rates,
    set_slots,
    settle_rates,
    soft_slots,
    use_window,
)

ASKED = {"one needle": "RULER single", "one of four keys": "RULER multi-key", "pass key": "pass key"}
"""What the model is asked for, by the names of ``needles.TASKS``."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and measure.

    Returns:
        ``recall``: right answers by arm and task; ``of``: questions of each task; ``adapter``: where it is.
    """
    options = parse(arguments)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    with user_errors("learn_to_recall"):
        options.output.mkdir(parents=True, exist_ok=True)
        texts = read_texts(options.text) if options.text else [load_text(None)]
        ask = find_adapter(options.ask, "--ask")
        model, tokenizer = load_causal_lm(options.model, getattr(torch, options.dtype), options.device)
        if options.ask is None:
            give_slots(model, options)
        else:
            load_adapter(model, ask)
            (options.window, options.sinks, options.slots) = sizes_of(model)
        documents = tokenize(tokenizer, texts, "texts")
        train, held_out = split(documents, options.held_out)
    print(memory_report(model).splitlines()[-1])
    freeze_base(model)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    options.begin = tokenizer("").input_ids  # of a model that wants a token before every text

    begun = time.perf_counter()
    recall = measure(model, encode, held_out, options, ("full attention", "window"))
    log: dict[str, list[Any]] = {"score_errors": [], "losses": []}
    if options.ask is None:
        learn(model, encode, train, options, log)
        save_adapter(model, options.output)
    recall |= measure(model, encode, held_out, options, ("slots",))
    results = {"recall": recall, "of": options.questions, "seconds": time.perf_counter() - begun, **log}
    (options.output / "recall.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + format_table(results, options))
    plot(results, options.output / "recall.png")
    print(f"{results['seconds'] / 60:.1f} minutes. All of this is in {options.output}")
    return results | {"adapter": options.ask or options.output}


def give_slots(model: Any, options: argparse.Namespace) -> None:
    """Retrofit a model with slots; scores and compressor may come from adapters that were trained before.

    Args:
        model: a causal language model of transformers.
        options: the command line.

    Raises:
        ValueError: if an adapter is not what is asked for.
    """
    sizes: dict[str, Any] = {"window_size": options.window, "num_sinks": options.sinks}
    compressor, trained = options.compressor, {}
    if options.scores_from is not None:
        found, slots = weights_of(model, options.scores_from, "--scores-from", sizes)
        if not slots:
            raise ValueError(f"--scores-from {options.scores_from}: this memory has no slots.")
        trained = {name: u for name, u in found.items() if ".eviction." in name}
        restore(model)
    if options.start_from is not None:
        found, slots = weights_of(model, options.start_from, "--start-from", sizes)
        if slots:
            raise ValueError(f"--start-from {options.start_from}: this memory has slots already, expected one without.")
        trained |= found
        record = model.hippocampus
        compressor = record.compressor
        sizes |= {"memory_positions": record.memory_positions, **record.options}
        restore(model)
    chosen = Compressor.by_name[compressor] if compressor else None
    retrofit(model, chosen, eviction=SalientSlots(options.slots), **sizes)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if name in trained:
                parameter.copy_(trained[name])


def weights_of(model: Any, adapter: str, option: str, sizes: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Give a model a trained memory; returns its weights by name, and how many slots it has."""
    load_adapter(model, find_adapter(adapter, option), **sizes)
    return {name: parameter.detach() for name, parameter in adapter_parameters(model)}, slots_of(model)


def sizes_of(model: Any) -> tuple[int, int, int]:
    """Window, sinks and slots (the mean of all layers) of a model.

    Raises:
        ValueError: if it has no slots.
    """
    salient_slots(model)
    return model.hippocampus.window.window_size, model.hippocampus.window.num_sinks, slots_of(model)


def split(documents: list[Tensor], share: float) -> tuple[list[Tensor], list[Tensor]]:
    """The beginning of every text to learn from, its end to be judged on."""
    cuts = [round(len(u) * (1 - share)) for u in documents]
    return [u[:cut] for u, cut in zip(documents, cuts, strict=True)], [
        u[cut:] for u, cut in zip(documents, cuts, strict=True)
    ]


def learn(
    model: Any, encode: Any, documents: list[Tensor], options: argparse.Namespace, log: dict[str, list[Any]]
) -> None:
    """The stages; errors and losses on the way go to the log."""

    def crops(stage: int, count: int) -> PlantedCrops:
        seed, facts = 3 * options.seed + stage, (options.facts[0], options.facts[1])
        return PlantedCrops(
            documents, options.length, count * options.batch, encode, facts=facts, begin=options.begin, seed=seed
        )

    how = {"batch": options.batch, "device": options.device, "workers": options.workers}
    if options.score_steps:
        log["score_errors"] += learn_attention(model, "1. attention to come", crops(0, options.score_steps), **how)
    heads = find_heads(model, "2. where facts are looked up", crops(1, options.retrieval_steps), **how)
    if heads is not None:
        log["retrieval"] = heads.tolist()
        set_rates(model, heads, coverage=options.coverage)
        save_adapter(model, options.output / "scores")
    for bar, batch in steps("3. answers", crops(2, options.steps), groups=answer_groups(model), **how):
        with soft_slots(model):
            found_loss = distillation_loss(model, batch["input_ids"], answers=batch["answers"], ce_weight=options.ce)
        found_loss.loss.backward()
        log["losses"].append(found_loss.loss.item())
        bar.set_postfix(loss=f"{mean(log['losses'][-10:]):.3f}")
        if len(log["losses"]) % 50 == 0:
            save_adapter(model, options.output)
    if options.steps:
        settle_rates(model)
    heads = find_heads(model, "4. which layers do so", crops(3, options.slot_steps), **how)
    if heads is not None:
        log["slots"] = set_slots(model, heads)


@torch.no_grad()
def measure(
    model: Any, encode: Any, documents: list[Tensor], options: argparse.Namespace, arms: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Right answers to questions about facts that have left the window."""
    found: dict[str, dict[str, int]] = {}
    bar = tqdm(total=len(arms) * len(ASKED) * options.questions, desc="questions", unit=" answers")
    for arm in arms:
        found[arm] = dict.fromkeys(ASKED, 0)
        with attention_of(model, arm, options.window + options.sinks + options.slots, options.sinks):
            for task in ASKED:
                rng = random.Random(options.seed)
                for _ in range(options.questions):
                    example = question(task, encode, documents, options, rng)
                    found[arm][task] += score(model, example, options.test_length)[0].correct
                    bar.update()
    bar.close()
    return found


def question(
    task: str, encode: Any, documents: list[Tensor], options: argparse.Namespace, rng: random.Random
) -> Example:
    """A text with something hidden in it that ends well before the tokens that are kept."""
    capacity = options.window + options.sinks + options.slots
    document = documents[rng.randrange(len(documents))]
    start = rng.randrange(max(1, len(document) - options.test_length))
    text = document[start : start + options.test_length].tolist()
    deepest = 1 - (capacity + 160) / options.test_length
    depth = rng.uniform(0.05, deepest)
    return make(ASKED[task], encode, text, options.test_length, depth, rng, begin=options.begin)


@contextmanager
def attention_of(model: Any, arm: str, capacity: int, sinks: int) -> Iterator[None]:
    """The model with full attention, with a window that holds as much as window and slots, or as it is."""
    if arm == "full attention":
        with full_attention(model):
            yield
    elif arm == "window":
        with use_window(model, capacity - sinks, sinks), window_only(model):
            yield
    else:
        yield


def format_table(results: dict[str, Any], options: argparse.Namespace) -> str:
    """Right answers, as text."""
    capacity, recall = options.window + options.sinks + options.slots, results["recall"]
    rows = [
        (f"full attention, {options.test_length:,} tokens", recall["full attention"]),
        (f"window, {capacity:,} tokens", recall["window"]),
        (f"slots, {capacity:,} tokens", recall["slots"]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{task:>20}" for task in ASKED)]
    lines += [
        name.ljust(width) + "".join(f"{found[task]:>14} of {results['of']:<3}" for task in ASKED)
        for name, found in rows
    ]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Answers by arm, and the losses on the way."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, arm in enumerate(results["recall"]):
        heights = [100 * results["recall"][arm][task] / results["of"] for task in ASKED]
        left.bar([j + 0.25 * i for j in range(len(ASKED))], heights, 0.22, **look(arm))
    left.set_xticks([j + 0.25 for j in range(len(ASKED))], list(ASKED))
    left.set(ylabel="right answers, %", ylim=(0, 105), title="Facts that have left the window")
    left.legend(fontsize=8)
    for name, label in (("score_errors", "error of the scores"), ("losses", "loss of the answers")):
        if results[name]:
            right.plot(results[name], label=label)
    if results["losses"] or results["score_errors"]:
        right.set(xlabel="step", yscale="log", title="Training")
        right.legend(fontsize=8)
    else:
        right.set_axis_off()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder, hub id or gemma3; default: SmolLM2-135M-Instruct")
    add("--text", type=Path, nargs="+", default=[], help="files or folders; default: the reference of Python")
    add("--held-out", type=number(0.9), default=0.3, help="share at the end of each text that judges (default: 0.3)")
    add("--window", type=positive, default=128, help="most recent tokens kept (default: 128)")
    add("--sinks", type=count, default=32, help="first tokens kept (default: 32)")
    add("--slots", type=positive, default=352, help="evicted tokens kept in each key/value head (default: 352)")
    add("--ask", help="an adapter with slots: ask the questions with it, and learn nothing")
    add("--compressor", choices=compressor_names(), help="takes what is not kept; default: none, it is lost")
    add("--start-from", help="an adapter without slots, whose compressor takes what is not kept")
    add("--scores-from", help="an adapter with slots, whose scores and rates to begin with")
    add("--ce", type=float, default=0.0, help="weight of the loss on the text itself in the third stage (default: 0)")
    add("--length", type=positive, default=1536, help="tokens in each training text (default: 1536)")
    add("--batch", type=positive, default=1, help="texts a step (default: 1)")
    add(
        "--facts",
        type=positive,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="facts hidden in each text, asked for one to three times each; default, which has been tried: 6 14 (about "
        "16 questions) in texts of up to 2,048 tokens, 2 6 (about 10) in longer ones",
    )
    add("--score-steps", type=count, default=120, help="steps of the first stage (default: 120)")
    add("--retrieval-steps", type=count, default=6, help="batches of the second stage (default: 6)")
    add("--steps", type=count, default=20, help="steps of the third stage (default: 20)")
    add("--slot-steps", type=count, default=0, help="batches of a fourth: the layers that look up get more slots (0)")
    add(
        "--coverage",
        type=number(1.0),
        default=0.9,
        help="share of all looking up that is done by the heads that keep for good at first (default: 0.9)",
    )
    add("--questions", type=positive, default=6, help="of each task (default: 6)")
    add("--test-length", type=positive, default=2048, help="tokens in each text of a question (default: 2048)")
    add("--workers", type=count, default=0, help="processes that make training texts (default: 0)")
    add("--seed", type=count, default=0)
    add("--device", type=device, default="cuda" if gpu else "cpu")
    add("--dtype", default="bfloat16" if gpu else "float32", choices=["float32", "bfloat16", "float16"])
    add("--output", type=Path, default=Path("recall"), help="folder for adapter, figures and picture (default: recall)")
    options = parser.parse_args(arguments)
    capacity = options.window + options.sinks + options.slots
    if options.test_length <= 1.1 * capacity + 200:
        parser.error(f"--test-length {options.test_length}: expected more than the {capacity} tokens kept, and 200")
    options.facts = options.facts or ((6, 14) if options.length <= 2048 else (2, 6))
    if options.facts[0] > options.facts[1]:
        parser.error(f"--facts {options.facts[0]} {options.facts[1]}: expected the smaller number first")
    least = max(options.window + options.sinks + 357, 528)  # attention beyond 256 tokens is learned; facts need room
    if options.length < least:
        parser.error(f"--length {options.length}: expected at least {least}")
    return options


if __name__ == "__main__":
    main()
