"""Measure what a memory is worth: full attention, the window alone, and window + memory, side by side.

    python examples/evaluate.py --adapter examples/adapters/smollm2-135m-instruct-gdn --text novel.txt --output results

Three parts run unless they are given 0: loss while a text streams by (``--tokens``), the share of the gap between
window and full attention that the memory closes at several capacities (``--stretches``), and needle tasks scored by
where the needle lies (``--needles``). Two run if they are given: loss on spans that come again after they were
evicted (``--spans``), and the ways to position the sinks (``--sink-positions``). Writes a table, a JSON file and a
picture.

A memory that has slots is compared at equal capacity (``arms.py``): the window holds as many tokens as window and slots
together. If it has a compressor as well, each of the two is also measured alone. ``--scores`` fills the slots by scores
that need no training, for comparison.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import (
    Help,
    add_device_options,
    compressor_names,
    count,
    find_adapter,
    give_memory,
    number,
    positive,
    user_errors,
)
from arms import arms_of, equal_window, own_window, set_rate, set_slots, slots_of
from evaluation_plots import plot
from gap import SEGMENT
from measures import Results, gaps, needles, sinks, sizes, spans, streaming
from needle_tasks import TASKS
from needle_wordings import WORDINGS
from quickstart import load_text
from smollm2 import load_causal_lm
from torch import Tensor

from ahn_layers import memory_report
from ahn_layers.evictions.scores import UNTRAINED


def main(arguments: Sequence[str] | None = None) -> Results:
    """Run the parts that were asked for; returns what is written to ``results.json``."""
    options = parse(arguments)
    with user_errors("evaluate"):
        model, tokenizer, documents = load(options)
    print(memory_report(model).splitlines()[-1])
    capacities = options.capacities or [own_window(model)]
    results: Results = {"model": options.model, "adapter": str(options.adapter), "tables": []}
    if slots_of(model):
        results["bytes"] = sizes(model, options, capacities, results["tables"])
    if options.tokens:
        results["streaming"] = streaming(model, documents, options, capacities[0], results["tables"])
    if options.stretches:
        results["gap"] = gaps(model, documents, options, capacities, results["tables"])
    if options.spans:
        results["spans"] = spans(model, documents, options, capacities[0], results["tables"])
    if options.needles:
        results["needles"] = needles(model, tokenizer, documents, options, capacities[0], results["tables"])
    if options.sink_positions:
        results["sinks"] = sinks(model, documents, options, capacities[0], results["tables"])
    print("\n\n".join(["", *results["tables"]]))
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "results.txt").write_text("\n\n".join(results["tables"]) + "\n")
    plot(results, options.output / "results.png")
    print(f"\n{options.output}/results.json, results.txt, results.png")
    return results


def load(options: argparse.Namespace) -> tuple[Any, Any, list[Tensor]]:
    """The model with its memory, its tokenizer, and the texts as token ids."""
    options.output.mkdir(parents=True, exist_ok=True)
    texts, adapter = [load_text(path) for path in options.text or [None]], find_adapter(options.adapter)
    model, tokenizer = load_causal_lm(options.model, getattr(torch, options.dtype), options.device)
    window, num_sinks = (options.capacities or [(None, None)])[0]
    give_memory(model, adapter, window=window, sinks=num_sinks, compressor=options.compressor)
    if options.slots is not None:
        set_slots(model, options.slots)
    if options.rate is not None:
        set_rate(model, options.rate)
    documents = [tokens_of(tokenizer, text) for text in texts]
    if options.scores and not slots_of(model):
        raise ValueError("--scores: this memory has no slots. Leave --scores out.")
    options.arms = (*arms_of(model), *options.scores)
    options.begin = tokenizer("").input_ids  # of a model that wants a token before every text
    check(documents, [equal_window(model, u) for u in options.capacities or [own_window(model)]], options)
    return model, tokenizer, documents


def check(documents: list[Tensor], capacities: list[tuple[int, int]], options: argparse.Namespace) -> None:
    """Stop before an hour of work if a later part has nothing to measure.

    Args:
        documents: the texts.
        capacities: ``(window_size, num_sinks)`` of the arms that keep most.
        options: the command line.
    """
    largest, longest = max(map(sum, capacities)), max(map(len, documents))
    if (options.stretches or options.spans) and longest < options.length:
        raise ValueError(f"--length {options.length}: the longest text has {longest} tokens. Choose a shorter length.")
    if options.stretches and options.length < max(largest, options.start) + 2:
        raise ValueError(
            f"--length {options.length}: nothing is measured before position {max(largest, options.start)} "
            "(--capacities, --start). Choose longer stretches, or a smaller window."
        )
    least = sum(capacities[0]) + capacities[0][1] + 2 * SEGMENT
    if options.spans and options.length < least:
        raise ValueError(
            f"--length {options.length}: a span of {SEGMENT} tokens that is evicted before it comes again needs "
            f"{least} tokens. Choose a longer length, or a smaller window."
        )
    least = sum(capacities[0]) + 128
    if options.needles and options.evicted and options.needle_length < least:
        raise ValueError(
            f"--needle-length {options.needle_length}: expected at least {least} where all needles are evicted "
            "(--evicted), 128 more than the window holds. Choose longer prompts, or a smaller window."
        )
    if options.tokens and longest < 2:
        raise ValueError(f"--tokens {options.tokens}: the longest text has {longest} tokens.")


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def capacity(text: str) -> tuple[int, int]:
    """``480+32`` as window and sinks."""
    window, _, sinks = text.partition("+")
    if not window.isdecimal() or not (sinks or "0").isdecimal() or int(window) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WINDOW+SINKS, such as 480+32")
    return int(window), int(sinks or 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder, hub id or gemma3; default: SmolLM2-135M-Instruct")
    add("--adapter", required=True, help="trained memory: folder, file or hub id")
    add("--compressor", choices=compressor_names(), help="of released weights (default: GatedDeltaNet)")
    add("--text", type=Path, nargs="+", help="UTF-8 text files; default: the reference of the Python language")
    add("--tokens", type=count, default=16_384, help="length of the text that streams by")
    add("--chunk", type=positive, default=512, help="tokens per call")
    add("--capacities", type=capacity, nargs="+", help="such as 480+32 1920+128; default: the adapter's own")
    add("--slots", type=positive, help="evicted tokens kept in each head; default: the adapter's own")
    add("--rate", type=number(1.0), help="of aging, in all heads of learned slots; default: the adapter's own, by head")
    add("--stretches", type=count, default=8, help="stretches of text to measure the gap on")
    add("--length", type=positive, default=8192, help="tokens in each stretch")
    add("--start", type=count, default=512, help="positions before this are never counted")
    add("--spans", type=count, default=0, help="texts of --length tokens at whose end an evicted span comes again")
    add("--needles", type=count, default=8, help="prompts for each needle task")
    add("--evicted", action="store_true", help="all needles where they are evicted, none in sinks and window")
    add("--batch", type=positive, default=8 if gpu else 1, help="prompts side by side (default: 1, on a GPU 8)")
    add("--needle-length", type=positive, default=4096, help="tokens in each prompt")
    add("--scores", nargs="*", default=[], choices=UNTRAINED, help="further arms: slots by scores without training")
    add(
        "--tasks",
        nargs="+",
        choices=[*TASKS, *WORDINGS],
        metavar="TASK",
        help=f"needle tasks (default: {', '.join(TASKS)}); in other wordings: {', '.join(WORDINGS)}",
    )
    add("--sink-positions", nargs="*", default=[], choices=["trained", "streaming", "absolute"], help="ways to compare")
    add("--seed", type=count, default=0, help="of the random numbers")
    add_device_options(parser)
    add("--output", type=Path, required=True, help="folder for results.json, results.txt, results.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
