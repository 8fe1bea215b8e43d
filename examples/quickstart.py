"""Read a text far longer than the window: full attention, the window alone, and window + memory, side by side.

    python examples/quickstart.py    # SmolLM2-135M-Instruct, 16,384 tokens, four minutes on two CPU cores
    python examples/quickstart.py --text novel.txt --tokens 32768 --adapter my_adapter

The default model comes with a trained memory, in ``examples/adapters``. It prints a table (loss by position, cache
bytes, peak memory, speed), draws it to a PNG, asks for a pass key that was hidden near the beginning of the text, and
lets the retrofitted model continue the text from the cache.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import SINKS, WINDOW, Help, add_device_options, count, find_adapter, give_memory, positive, user_errors
from arms import equal_window, own_window, use_arm
from looks import look
from matplotlib.figure import Figure
from pass_key import KEY, PLACE, ask, hide
from peak_memory import PeakMemory
from smollm2 import load_causal_lm
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from ahn_layers import memory_report

TRAINED = Path(__file__).parent / "adapters" / "smollm2-135m-instruct-recall"
"""A trained memory for the default model."""


@dataclass
class Reading:
    """What one arm measured while it read the text.

    Attributes:
        losses: nats per token, shape (T,).
        positions: tokens read after each chunk.
        cache_bytes: bytes of the cache after each chunk.
        peak_bytes: most memory added while reading, None if it cannot be measured.
        seconds: time for the whole text.
    """

    losses: Tensor
    positions: list[int]
    cache_bytes: list[int]
    peak_bytes: int | None
    seconds: float


@torch.no_grad()
def read(model: Any, ids: Tensor, chunk: int, name: str) -> tuple[Reading, Any]:
    """Stream a text through a model, chunk by chunk, with a cache.

    Args:
        model: a causal language model of transformers.
        ids: token ids, shape (1, T + 1); every one but the last is read, every one but the first predicted.
        chunk: tokens per call.
        name: of the progress bar.

    Returns:
        What was measured, and the cache, which has seen all tokens but the last.
    """
    cache: Any = DynamicCache(config=model.config)
    losses, positions, sizes = [], [], []
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with PeakMemory(ids.device) as peak, tqdm(total=inputs.shape[1], desc=f"{name:14}", unit=" tokens") as bar:
        start = time.perf_counter()
        for begin in range(0, inputs.shape[1], chunk):
            part = slice(begin, begin + chunk)
            logits = model(inputs[:, part], cache=cache, use_cache=True).logits
            losses.append(F.cross_entropy(logits[0].float(), targets[0, part], reduction="none").cpu())
            bar.update(len(losses[-1]))
            positions.append(bar.n)
            sizes.append(cache_bytes(cache))
        seconds = time.perf_counter() - start
    return Reading(torch.cat(losses), positions, sizes, peak.nbytes, seconds), cache


def cache_bytes(cache: Any) -> int:
    """Bytes held by a cache of transformers, with or without memory layers."""
    return sum(
        layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )


def compare(model: Any, ids: Tensor, chunk: int, tokenizer: Any = None) -> tuple[dict[str, Reading], Any, Any]:
    """Read a text by full attention, by the window alone, and with the memory; then ask each for the pass key.

    Args:
        model: a retrofitted model. The window alone keeps as many tokens as the memory's window and slots.
        ids: token ids, shape (1, T + 1).
        chunk: tokens per call.
        tokenizer: that of the model; None to ask nothing.

    Returns:
        A reading for each, their answers by name, and the cache of the last, the memory.
    """
    arms = {"full attention": "full", "window only": "window", "memory": "memory"}
    with torch.no_grad():
        model(ids[:, :chunk])  # warm up: the first arm should pay neither for lazy loading nor for thread pools
    readings, answers, cache = {}, {}, None
    for name, arm in arms.items():
        cache = None  # lets go of the cache of the arm before
        with use_arm(model, arm):
            readings[name], cache = read(model, ids, chunk, name)
            if tokenizer is not None:
                answers[name] = ask(model, tokenizer, ids, copy.deepcopy(cache) if arm == "memory" else cache)
    return readings, answers, cache


def format_table(readings: dict[str, Reading], capacity: int) -> str:
    """Loss by position (ranges double from the window's capacity on), memory and speed of every arm."""
    arms = list(readings.values())
    edges, tokens = [0], len(arms[0].losses)
    while edges[-1] < tokens:
        edges.append(min(tokens, max(capacity, 2 * edges[-1])))
    rows = [("", *readings)]
    for low, high in pairwise(edges):
        rows.append((f"loss, tokens {low:,}-{high:,}", *(f"{arm.losses[low:high].mean():.3f}" for arm in arms)))
    rows.append(("cache at the end, MB", *(f"{arm.cache_bytes[-1] / 1e6:.1f}" for arm in arms)))
    rows.append(
        ("peak memory, MB *", *("-" if arm.peak_bytes is None else f"{arm.peak_bytes / 1e6:.0f}" for arm in arms))
    )
    rows.append(("tokens per second", *(f"{tokens / arm.seconds:.0f}" for arm in arms)))
    lines = [f"{row[0]:28}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def plot(readings: dict[str, Reading], capacity: int, trained: int, path: Path) -> None:
    """Draw loss and cache bytes over position.

    Args:
        readings: of every arm.
        capacity: tokens that the window holds.
        trained: positions that the model was trained on.
        path: of the PNG.
    """
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    loss_axes, cache_axes = figure.subplots(2, 1, sharex=True)
    lines = {"full attention": ("-", 2.0), "window only": ("-", 3.5), "memory": ("--", 1.5)}
    for name, arm in readings.items():
        style, width = lines[name]
        drawn = look(name) | {"linestyle": style, "linewidth": width}
        loss_axes.plot(*smooth(arm.losses, max(1, len(arm.losses) // 32)), **drawn)
        cache_axes.plot([0, *arm.positions], [0, *(size / 1e6 for size in arm.cache_bytes)], **drawn)
    tokens = len(next(iter(readings.values())).losses)
    for axes, label in ((loss_axes, "loss, nats per token"), (cache_axes, "cache, MB")):
        for position, meaning in ((capacity, "window full"), (trained, "trained length")):
            if position < tokens:
                axes.axvline(position, color="black", linewidth=0.8, linestyle=":")
                axes.annotate(f" {meaning}", (position, 0.98), xycoords=("data", "axes fraction"), va="top", fontsize=8)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    cache_axes.set_xlabel("position, tokens")
    cache_axes.set_xlim(0, tokens)
    loss_axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(readings), frameon=False)
    figure.savefig(path, dpi=150)


def smooth(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean over a sliding window, and the position in the middle of it."""
    means = F.avg_pool1d(values[None], width, stride=1)[0]
    return torch.arange(len(means)) + width / 2, means


def continue_text(model: Any, tokenizer: Any, ids: Tensor, cache: Any, count: int = 60) -> str:
    """Greedy continuation of a text of which all but the last token is in the cache."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :]))


def load_text(path: Path | None) -> str:
    """A text file, or the reference of the Python language that every CPython carries."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def choose_adapter(args: argparse.Namespace) -> str | Path | None:
    """The adapter to load, None for an untrained memory."""
    if args.adapter:
        return None if args.adapter == "none" else args.adapter
    if args.model:
        return None
    if not (TRAINED / "adapter.safetensors").exists():
        print(f"{TRAINED}: no trained memory here, going on with an untrained one. It comes with the repository.")
        return None
    return TRAINED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Help)
    parser.add_argument("--model", help="folder or hub id of a causal language model (default: SmolLM2-135M-Instruct)")
    adapter = "trained memory: folder, file, hub id, or 'none' (default: the one that comes with the default model)"
    parser.add_argument("--adapter", help=adapter)
    parser.add_argument("--text", type=Path, help="UTF-8 text file (default: the reference of the Python language)")
    parser.add_argument("--tokens", type=positive, default=16_384, help="length of text to read")
    parser.add_argument("--chunk", type=positive, default=512, help="tokens per call of the model")
    parser.add_argument("--window", type=positive, help=f"recent tokens kept (default: the adapter's, or {WINDOW})")
    parser.add_argument("--sinks", type=count, help=f"first tokens kept (default: the adapter's, or {SINKS})")
    parser.add_argument("--plot", type=Path, default=Path("quickstart.png"), help="where the picture goes")
    add_device_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the whole comparison.

    Returns:
        ``readings`` and ``answers`` by arm, ``table``, ``continuation`` and ``plot``.
    """
    args = parse(argv)
    with user_errors("quickstart"):
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        text, adapter = load_text(args.text), find_adapter(choose_adapter(args))
        model, tokenizer = load_causal_lm(args.model, getattr(torch, args.dtype), args.device)
        give_memory(model, adapter, window=args.window, sinks=args.sinks)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens + 1].to(args.device)
        if ids.shape[1] < 2:
            raise ValueError(f"--text {args.text}: expected at least 2 tokens, found {ids.shape[1]}.")
        capacity, trained = (
            sum(equal_window(model, own_window(model, "--window and --sinks"))),
            model.config.max_position_embeddings,
        )
    print(memory_report(model))

    plain, ids = ids, hide(tokenizer, ids, capacity)
    asked = not torch.equal(plain, ids)
    readings, answers, cache = compare(model, ids, args.chunk, tokenizer if asked else None)
    table = format_table(readings, capacity)
    print(f"\n{table}\n* most added while reading: {PeakMemory(ids.device).meaning}")
    if not adapter:
        print("The memory is untrained (no adapter): its output is zero, so the memory arm equals window only.")
    plot(readings, capacity, trained, args.plot)
    print(f"Loss and cache over position: {args.plot}")
    if asked:
        print(f"\nAsked for the pass key {KEY}, hidden after {PLACE:,} of {ids.shape[1] - 1:,} tokens:")
        for name, answer in answers.items():
            print(f"  {'right' if answer.startswith(KEY) else 'wrong'}  {name:16}{answer}")

    continuation = continue_text(model, tokenizer, ids, cache)
    print(f"\n[...]{tokenizer.decode(ids[0, -60:])}\n[continued by the retrofitted model] {continuation}")
    return {"readings": readings, "table": table, "answers": answers, "continuation": continuation, "plot": args.plot}


if __name__ == "__main__":
    main()
