"""Teach a language model to recall what has left its window.

    python examples/learn_to_recall.py
    python examples/learn_to_recall.py --ask examples/adapters/smollm2-135m-instruct-recall    # three minutes on a CPU

Every key/value head of SmolLM2-135M-Instruct keeps some evicted tokens in slots. Which ones, a small network in each
layer learns in three stages: from where the model looks facts up, from the attention that tokens will get, and from the
model's own answers. With ``--slots-by-layer`` the layers that look facts up have the slots of all: for long texts.
Facts are hidden in the text of Python's reference manual, or in texts of yours (``--text``). Then the model is asked
for facts in other wordings that have left the window: with full attention, with a window that holds as many tokens, and
with the slots.

Writes an adapter and a picture. With ``--ask ADAPTER`` it asks with a memory that is trained already; one comes with
the repository, as in the second command. On a GPU, longer texts and more of them:
``--length 8192 --batch 2 --score-steps 200 --steps 110 --slots-by-layer``. ``--model gemma3`` teaches Gemma 3 270M, see
``gemma3.py``.
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
from _common import find_adapter, user_errors
from arms import set_slots as resize_slots
from arms import slots_of, stores_of
from looks import look
from matplotlib.figure import Figure
from needles import Example, make, score
from planting import PlantedCrops
from quickstart import load_text
from recall_options import check_lengths, parse
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
    options = parse(arguments, __doc__)
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
            use_sizes(model, options)
        documents = tokenize(tokenizer, texts, "texts")
        train, held_out = split(documents, options.held_out)
        held_out = long_enough(held_out, options)
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
    compressor, trained, slots = options.compressor, {}, []
    if options.scores_from is not None:
        found, slots = weights_of(model, options.scores_from, "--scores-from", sizes)
        if not any(slots):
            raise ValueError(f"--scores-from {options.scores_from}: this memory has no slots.")
        trained = {name: u for name, u in found.items() if ".eviction." in name}
        restore(model)
    if options.start_from is not None:
        found, others = weights_of(model, options.start_from, "--start-from", sizes)
        if any(others):
            raise ValueError(f"--start-from {options.start_from}: this memory has slots already, expected one without.")
        trained |= found
        record = model.hippocampus
        compressor = record.compressor
        sizes |= {"memory_positions": record.memory_positions, **record.options}
        restore(model)
    chosen = Compressor.by_name[compressor] if compressor else None
    retrofit(model, chosen, eviction=SalientSlots(options.slots), **sizes)
    if slots:
        for policy, number in zip(salient_slots(model), slots, strict=True):
            policy.num_slots = number
        use_slots(model, options)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if name in trained:
                parameter.copy_(trained[name])


def weights_of(model: Any, adapter: str, option: str, sizes: dict[str, Any]) -> tuple[dict[str, Tensor], list[int]]:
    """Give a model a trained memory; returns its weights by name, and how many slots each layer has."""
    load_adapter(model, find_adapter(adapter, option), **sizes)
    slots = [int(getattr(store.eviction, "num_slots", 0)) for store in stores_of(model)]
    return {name: parameter.detach() for name, parameter in adapter_parameters(model)}, slots


def use_slots(model: Any, options: argparse.Namespace) -> None:
    """As many slots as were asked for, divided among the layers as they are; those that there are by default."""
    if "slots" in options.given:
        resize_slots(model, options.slots)
    options.slots = slots_of(model)
    check_lengths(options)


def use_sizes(model: Any, options: argparse.Namespace) -> None:
    """Ask with the window, sinks and slots (the mean of all layers) that a memory has.

    Raises:
        ValueError: if it has no slots, or other sizes than were asked for.
    """
    salient_slots(model)
    window = model.hippocampus.window
    sizes = {"window": window.window_size, "sinks": window.num_sinks, "slots": slots_of(model)}
    for name, size in sizes.items():
        if name in options.given and getattr(options, name) != size:
            raise ValueError(
                f"--{name} {getattr(options, name)}: the memory of --ask {options.ask} has {size}. Leave --{name} out."
            )
        setattr(options, name, size)
    check_lengths(options)


def long_enough(documents: list[Tensor], options: argparse.Namespace) -> list[Tensor]:
    """The texts in which a question fits.

    Raises:
        ValueError: if there are none.
    """
    found = [u for u in documents if len(u) >= options.test_length]
    if not found:
        raise ValueError(
            f"--test-length {options.test_length}: the longest text has {max(map(len, documents), default=0)} tokens "
            f"at its end that judge (--held-out {options.held_out:g}). Give longer texts, or choose another of the two."
        )
    return found


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
    heads = find_heads(model, "1. where facts are looked up", crops(1, options.retrieval_steps), **how)
    if heads is not None:
        log["retrieval"] = heads.tolist()
        set_rates(model, heads, coverage=options.coverage)
        if options.slots_by_layer:
            log["slots"] = set_slots(model, heads)
    if options.score_steps:
        log["score_errors"] += learn_attention(model, "2. attention to come", crops(0, options.score_steps), **how)
    if options.score_steps or heads is not None:
        save_adapter(model, options.output / "scores")
    for bar, batch in steps("3. answers", crops(2, options.steps), groups=answer_groups(model), **how):
        with soft_slots(model):
            weights = {"answer_weight": 1 - options.truth, "answer_ce_weight": options.truth, "ce_weight": options.ce}
            found_loss = distillation_loss(model, batch["input_ids"], answers=batch["answers"], **weights)
        found_loss.loss.backward()
        log["losses"].append(found_loss.loss.item())
        bar.set_postfix(loss=f"{mean(log['losses'][-10:]):.3f}")
        if len(log["losses"]) % 50 == 0:
            save_adapter(model, options.output)
    if options.steps:
        settle_rates(model)


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


if __name__ == "__main__":
    main()
