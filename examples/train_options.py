"""The command line of ``train.py``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from _common import Help, add_memory_options, count, given, number, positive

WINDOW, SINKS = 480, 32
"""The window of the adapter. Each training step draws its own, unless there are slots."""


def add_slot_options(parser: argparse.ArgumentParser) -> None:
    """What a memory with slots is trained with."""
    add = parser.add_argument_group("slots", "texts then have facts in them that are asked for later").add_argument
    add("--slots", type=positive, help="evicted tokens kept in each key/value head, by a score that is learned")
    add("--teach", choices=["both", "scores", "compressor"], default="both", help="what the steps train")
    add("--retrieval-steps", type=count, default=0, help="batches of a first stage: heads that look facts up are found")
    add("--score-steps", type=count, default=0, help="steps of a second stage: scores learn the attention to come")
    add(
        "--coverage",
        type=number(1.0),
        default=0.9,
        help="share of all looking up done by heads that keep for good at first",
    )
    add("--slots-by-layer", action="store_true", help="the layers that do half of the looking up get all slots")
    add("--facts", type=positive, nargs=2, default=[2, 6], metavar=("LEAST", "MOST"), help="facts in each text")
    add("--truth", type=number(1.0), default=0.5, help="share of the true answers in the loss of answers")
    add("--temperature", type=number(100.0), default=0.5, help="of the soft choice of the kept tokens")


def check_slots(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Stop if the options for slots do not fit the others."""
    if options.slots and options.start_from:
        parser.error("--slots: the adapter of --start-from has its own. Leave one of them out.")
    if options.facts[0] > options.facts[1]:
        parser.error(f"--facts {options.facts[0]} {options.facts[1]}: expected the smaller number first")
    if options.temperature == 0:
        parser.error("--temperature 0: expected a positive number")
    if options.coverage == 0:
        parser.error("--coverage 0: expected a share above 0")
    if options.slots_by_layer and not options.retrieval_steps:
        parser.error("--slots-by-layer: which layers look up has to be measured. Give --retrieval-steps.")
    if options.slots and options.compile:
        parser.error("--compile: not with --slots")


def check_dev_length(options: argparse.Namespace, capacity: int) -> None:
    """Raise unless the texts of ``--dev`` go on beyond the window."""
    if options.dev and options.dev_length < capacity + 2:
        raise ValueError(
            f"--dev-length {options.dev_length}: expected at least {capacity + 2}, since the window holds {capacity}."
        )


def parse(arguments: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The command line of ``train.py``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    add("--text", type=Path, nargs="+", default=[], help="files (.txt, .md, .jsonl) or folders of them, to train on")
    add("--dataset", help="hub id, folder or file (.jsonl, .json, .csv, .parquet) for datasets, instead of --text")
    add("--config", help="configuration of the dataset, if it has several")
    add("--split", default="train", help="split of the dataset")
    add("--column", default="text", help="column of the dataset, or field of .jsonl files, that holds the text")
    add("--streaming", action="store_true", help="read no more of the dataset than the steps need")
    add("--dev", type=Path, nargs="+", default=[], help="files or folders, as for --text, to measure on")
    add("--dev-length", type=positive, default=8192, help="tokens in each stretch of --dev")
    add("--dev-count", type=positive, default=8, help="stretches to measure on")
    add_memory_options(parser, WINDOW, SINKS)
    add_slot_options(parser)
    add("--shared-state", action="store_true", help="one state per key/value head, not per query head")
    add("--memory-positions", choices=["absolute", "none"], help="rotated keys in the memory (default), or not")
    add("--start-from", help="adapter to go on from, with a new schedule, instead of an empty memory")
    add("--steps", type=positive, default=200, help="training steps")
    add("--align-steps", type=count, default=0, help="steps of the cheap first stage, layer by layer")
    add("--length", type=positive, default=4096, help="tokens in each training sequence")
    add("--batch", type=positive, default=8, help="sequences in each batch of each process")
    add("--accumulate", type=positive, default=1, help="batches whose gradients make one step")
    add("--lr", type=number(10.0), default=2e-3, help="learning rate at its highest")
    add("--ce", type=number(1000.0), default=0.0, help="weight of the cross-entropy, beside the divergence")
    add("--layer-loss", type=number(1000.0), default=0.0, help="weight of the error of each layer's attention output")
    add(
        "--shortest",
        type=number(0.99),
        default=0.0,
        help="smallest window, sinks included, drawn for a step, as a share of the length",
    )
    add(
        "--draw-sinks",
        type=count,
        nargs="+",
        default=[4, 16, 32, 64, 128],
        help="numbers of sinks to draw from for a step",
    )
    add("--copies", type=number(1.0), default=0.5, help="share of sequences with repeated spans")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, more time: the backward pass runs layers again",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the layers; default: in half precision on a GPU",
    )
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--eval-every", type=count, default=0, help="steps between measurements on --dev; 0 measures at the end only")
    add("--save-every", type=positive, default=100, help="steps between checkpoints")
    add("--seed", type=count, default=0, help="of the random numbers")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add(
        "--output",
        type=Path,
        required=True,
        help="folder for the adapter and its checkpoints; earlier ones are replaced",
    )
    options = parser.parse_args(arguments)
    if bool(options.text) == bool(options.dataset):
        parser.error("give one of --text and --dataset")
    if not options.dataset and (options.config or options.streaming or options.split != "train"):
        parser.error("--config, --split and --streaming are for --dataset")
    if options.eval_every and not options.dev:
        parser.error("--eval-every: give texts to measure on, by --dev")
    check_slots(parser, options)
    options.for_slots = given(parser, options, ("coverage", "facts", "temperature", "truth"))
    options.without_slots = given(parser, options, ("shortest", "draw_sinks", "copies"))
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: a file, expected a folder")
    try:
        sinks = SINKS if options.sinks is None else options.sinks
        capacity = (options.window or WINDOW) + sinks + (options.slots or 0)
        check_dev_length(options, 1 if options.start_from else capacity)
    except ValueError as error:
        parser.error(str(error))
    return options
