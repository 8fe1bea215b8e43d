"""The command line of ``learn_to_recall.py``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from _common import Help, add_device_options, compressor_names, count, given, number, positive

SIZES = {"window": 192, "sinks": 32, "slots": 288}
"""What a memory keeps that is not trained yet."""
EXCLUDED = {"ask": ("compressor", "start_from", "scores_from"), "start_from": ("compressor",)}
"""For each option that names an adapter, those that say something that the adapter says."""
LEARNING = ("ce", "truth", "length", "batch", "facts", "score_steps", "retrieval_steps", "steps")
LEARNING += ("slots_by_layer", "coverage", "workers")
"""Options of the training alone."""


def facts_for(length: int) -> tuple[int, int]:
    """Least and most number of facts in a training text: few teach more than many, see ``docs/recall.md``."""
    return (6, 14) if length <= 2048 else (max(1, 2 * length // 4096), max(1, 6 * length // 4096))


def check_lengths(options: argparse.Namespace) -> None:
    """Raise a ValueError unless the texts of questions go on beyond what is kept."""
    capacity = options.window + options.sinks + options.slots
    if options.test_length <= 1.1 * capacity + 200:
        raise ValueError(f"--test-length {options.test_length}: expected more than the {capacity} tokens kept, and 200")


def parse(arguments: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The command line of ``learn_to_recall.py``; ``given`` has the names of the sizes that were."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder, hub id or gemma3; default: SmolLM2-135M-Instruct")
    add("--text", type=Path, nargs="+", default=[], help="files or folders; default: the reference of Python")
    add("--held-out", type=number(0.9), default=0.3, help="share at the end of each text that judges (default: 0.3)")
    add("--window", type=positive, help=f"most recent tokens kept (default: {SIZES['window']})")
    add("--sinks", type=count, help=f"first tokens kept (default: {SIZES['sinks']})")
    add("--slots", type=positive, help=f"evicted tokens kept in each key/value head (default: {SIZES['slots']})")
    add("--ask", help="an adapter with slots: ask the questions with it, and learn nothing")
    add("--compressor", choices=compressor_names(), help="takes what is not kept; default: none, it is lost")
    add("--start-from", help="an adapter without slots, whose compressor takes what is not kept")
    add("--scores-from", help="an adapter with slots, whose scores and rates to begin with")
    add("--ce", type=number(1000.0), default=0.0, help="weight of the loss on the text in the third stage (default: 0)")
    add(
        "--truth",
        type=number(1.0),
        default=0.5,
        help="share of the true answers in the loss of answers, the rest is what full attention answers (default: 0.5)",
    )
    add("--length", type=positive, default=1536, help="tokens in each training text (default: 1536)")
    add("--batch", type=positive, default=1, help="texts a step (default: 1)")
    add(
        "--facts",
        type=positive,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="facts hidden in each text, asked for one to three times each; default, which has been tried: 6 14 (about "
        "16 questions) in texts of up to 2,048 tokens, 2 6 (about 10) for each 4,096 tokens of longer ones",
    )
    add("--retrieval-steps", type=count, default=6, help="batches of the first stage (default: 6)")
    add("--score-steps", type=count, default=120, help="steps of the second stage (default: 120)")
    add("--steps", type=count, default=20, help="steps of the third stage (default: 20)")
    add("--slots-by-layer", action="store_true", help="the layers that do half of the looking up get all slots")
    add(
        "--coverage",
        type=number(1.0),
        default=0.9,
        help="share of all looking up that is done by the heads that keep for good at first (default: 0.9)",
    )
    add("--questions", type=positive, default=6, help="of each task (default: 6)")
    add("--test-length", type=positive, default=2048, help="tokens in each text of a question (default: 2048)")
    add("--workers", type=count, default=0, help="processes that make training texts (default: 0)")
    add("--seed", type=count, default=0, help="of the random numbers")
    add_device_options(parser)
    add("--output", type=Path, default=Path("recall"), help="folder for adapter, figures and picture (default: recall)")
    options = parser.parse_args(arguments)
    options.given = {name for name in SIZES if getattr(options, name) is not None}
    for name, size in SIZES.items():
        setattr(options, name, size if getattr(options, name) is None else getattr(options, name))
    for adapter, excluded in EXCLUDED.items():
        for name in excluded:
            if getattr(options, adapter) and getattr(options, name):
                flag, other = (f"--{u.replace('_', '-')}" for u in (name, adapter))
                parser.error(f"{flag}: the adapter of {other} has its own. Leave one of them out.")
    unused = {
        "--ask": LEARNING if options.ask else (),
        "--steps 0": () if options.steps else ("ce", "truth"),
        "--retrieval-steps 0": () if options.retrieval_steps else ("coverage", "slots_by_layer"),
    }
    for why, names in unused.items():
        if ignored := given(parser, options, names):
            parser.error(f"{', '.join(ignored)}: with {why} this changes nothing. Leave it out.")
    try:
        if options.ask is None:
            check_lengths(options)
    except ValueError as error:
        parser.error(str(error))
    options.facts = options.facts or facts_for(options.length)
    if options.facts[0] > options.facts[1]:
        parser.error(f"--facts {options.facts[0]} {options.facts[1]}: expected the smaller number first")
    if options.coverage == 0:
        parser.error("--coverage 0: expected a share above 0")
    least = max(options.window + options.sinks + 357, 528)  # attention beyond 256 tokens is learned; facts need room
    if options.ask is None and options.length < least:
        parser.error(f"--length {options.length}: expected at least {least}")
    return options
