"""Show which tokens of a text a memory with slots keeps without loss, in each layer and key/value head.

    python examples/what_is_kept.py    # SmolLM2-135M-Instruct, 64 slots for the largest values, 15 seconds
    python examples/what_is_kept.py --score key_norm --tokens 4096 --html kept.html --plot kept.png

The text is printed with sinks, window and kept tokens marked, then a table of all heads. ``--html`` writes the text as
a page, on which each token says which heads keep it; ``--plot`` draws the kept tokens of each head over their rank.
With ``--adapter`` the slots are those of a trained memory.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Help, add_device_options, count, find_adapter, give_memory, number, positive, user_errors
from kept import kept_tokens, read
from kept_page import plot, to_html
from kept_text import describe, format_table, legend, mark_text, split_text
from quickstart import load_text
from smollm2 import load_causal_lm
from torch import Tensor

from ahn_layers import HippocampalAttention, SalientSlots, retrofit
from ahn_layers.evictions.scores import UNTRAINED

WINDOW, SINKS, SLOTS, SCORE = 256, 4, 64, "value_norm"
"""Without an adapter: small sizes, so that a short text shows something."""


def give_slots(model: Any, adapter: Path | None, args: argparse.Namespace) -> None:
    """Retrofit a model with the slots of a trained memory, or with slots and a score that needs no training.

    Raises:
        ValueError: if the trained memory has no slots.
    """
    if adapter is None:
        window, sinks = args.window or WINDOW, SINKS if args.sinks is None else args.sinks
        slots = SalientSlots(args.slots or SLOTS, score=args.score or SCORE, rate=args.rate or 0.0)
        retrofit(model, None, window_size=window, num_sinks=sinks, eviction=slots)
        return
    give_memory(model, adapter, window=args.window, sinks=args.sinks)
    stores = [module.memory for module in model.modules() if isinstance(module, HippocampalAttention)]
    if not any(isinstance(store.eviction, SalientSlots) for store in stores):
        raise ValueError(
            f"--adapter {adapter}: this memory has no slots, it keeps nothing but sinks and window. Name an adapter "
            "that was trained with SalientSlots, or leave --adapter out: --slots and --score need no training."
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder or hub id of a causal language model (default: SmolLM2-135M-Instruct)")
    add("--adapter", help="trained memory with slots: folder or hub id (default: a score without training)")
    add("--slots", type=positive, help=f"without an adapter: slots of each key/value head (default: {SLOTS})")
    add("--score", choices=sorted(UNTRAINED), help=f"without an adapter: which tokens are kept (default: {SCORE})")
    add("--rate", type=number(1e6), help="without an adapter: bonus of each token over the one before (default: 0)")
    add("--window", type=positive, help=f"tokens kept without loss (default: the adapter's, else {WINDOW})")
    add("--sinks", type=count, help=f"first tokens, always kept (default: the adapter's, else {SINKS})")
    add("--text", type=Path, help="UTF-8 text file (default: the reference of the Python language)")
    add("--tokens", type=positive, default=2048, help="length of text to read (default: 2048)")
    add("--chunk", type=positive, default=512, help="tokens per call of the model (default: 512)")
    add("--html", type=Path, help="write the marked text to this page")
    add("--plot", type=Path, help="draw the kept tokens to this picture")
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.adapter and (args.slots or args.score or args.rate is not None):
        parser.error("--slots, --score, --rate: the adapter has its own. Leave these out, or --adapter.")
    return args


def load(args: argparse.Namespace) -> tuple[Any, Tensor, list[str]]:
    """The model with its slots, the token ids, shape (1, T), and the text of each token."""
    for path in (args.html, args.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise ValueError(f"{path}: is a folder. Name a file for --html and --plot.")
    text, adapter = load_text(args.text), find_adapter(args.adapter)
    model, tokenizer = load_causal_lm(args.model, getattr(torch, args.dtype), args.device)
    give_slots(model, adapter, args)
    ids, pieces = split_text(tokenizer, text, args.tokens)
    if not ids:
        raise ValueError(f"--text {args.text}: expected at least 1 token, found none.")
    return model, torch.tensor([ids], device=args.device), pieces


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read a text and show what is kept.

    Returns:
        ``kept``, whether each head keeps each token, and its ``priority``, shape (layers, heads, tokens); ``found``,
        which has both; ``pieces``, the text of each token; ``text``, marked; ``table``; ``html`` and ``plot``, paths or
        None.
    """
    args = parse(argv)
    with user_errors("what_is_kept"):
        model, ids, pieces = load(args)
    found = kept_tokens(read(model, ids, args.chunk))
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text, table = mark_text(found, pieces, color=color), format_table(found, pieces)
    print(f"{describe(found)}\n{legend(color)}\n\n{text}\n")
    capacity = found.window.capacity
    if found.seen > capacity:
        print(table)
    else:
        print(
            f"Nothing has been evicted yet: sinks and window hold {capacity:,} tokens, the text has {found.seen:,}. "
            "Read more (--tokens, --text), or choose a smaller --window."
        )
    if args.html is not None:
        args.html.write_text(to_html(found, pieces), encoding="utf-8")
        print(f"Page: {args.html}")
    if args.plot is not None:
        plot(found, args.plot)
        print(f"Kept tokens over rank: {args.plot}")
    return {
        "kept": found.kept, "priority": found.priority, "found": found, "pieces": pieces, "text": text, "table": table,
        "html": args.html, "plot": args.plot,
    }  # fmt: skip


if __name__ == "__main__":
    main()
