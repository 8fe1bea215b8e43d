"""Measure what a memory is worth: full attention, the window alone, and window + memory, side by side.

    python examples/evaluate.py --adapter examples/adapters/smollm2-135m-instruct-gdn --text novel.txt --output results

Five parts, each switched off by giving it 0: loss while a text streams by (``--tokens``), the share of the gap between
window and full attention that the memory closes at several capacities (``--stretches``), loss on spans that come again
after they were evicted (``--spans``), needle tasks scored by where the needle lies (``--needles``), and the ways to
position the sinks (``--sink-positions``). Writes a table, a JSON file and a picture.

A memory that has slots is compared at equal capacity (``arms.py``): the window holds as many tokens as window and slots
together. If it has a compressor as well, each of the two is also measured alone.
"""

import argparse
import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _common import count, find_adapter, give_memory, positive
from arms import arm_bytes, arms_of, called, equal_window, own_window, positioned, slots_of, use_arm
from gap import SEGMENT, measure, measure_spans, span_losses, stretch_losses
from matplotlib.figure import Figure
from needles import TASKS, Needle, make, rank, score, tally
from quickstart import Reading, format_table, load_text, read, smooth
from smollm2 import load_causal_lm
from texts import stretches
from torch import Tensor
from tqdm import tqdm

from ahn_layers import Compressor, memory_report

Results = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Results:
    """Run the parts that were asked for; returns what is written to ``results.json``."""
    options = parse(arguments)
    try:
        model, tokenizer, documents = load(options)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"evaluate: {error}") from None
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
    plot(results, options.output / "results.png")
    print("\n\n".join(["", *results["tables"]]))
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "results.txt").write_text("\n\n".join(results["tables"]) + "\n")
    print(f"\n{options.output}/results.json, results.txt, results.png")
    return results


def load(options: argparse.Namespace) -> tuple[Any, Any, list[Tensor]]:
    """The model with its memory, its tokenizer, and the texts as token ids."""
    options.output.mkdir(parents=True, exist_ok=True)
    texts, adapter = [load_text(path) for path in options.text or [None]], find_adapter(options.adapter)
    model, tokenizer = load_causal_lm(options.model, getattr(torch, options.dtype), options.device)
    window, num_sinks = (options.capacities or [(None, None)])[0]
    give_memory(model, adapter, window=window, sinks=num_sinks, compressor=options.compressor)
    documents = [tokens_of(tokenizer, text) for text in texts]
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
    if options.tokens and longest < 2:
        raise ValueError(f"--tokens {options.tokens}: the longest text has {longest} tokens.")


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def table(title: str, rows: list[tuple[str, ...]]) -> str:
    """Rows as text, the first one the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        lines.append(
            "  ".join([f"{name:<{widths[0]}}", *(f"{u:>{w}}" for u, w in zip(cells, widths[1:], strict=True))])
        )
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def sizes(model: Any, options: argparse.Namespace, capacities: list[tuple[int, int]], tables: list[str]) -> Results:
    """Tokens that each arm keeps without loss, and bytes of its cache for one text."""
    lengths = (options.tokens, options.needles and options.needle_length)
    length = max(*lengths, (options.stretches or options.spans or options.sink_positions) and options.length)
    results: Results = {}
    rows: list[tuple[str, ...]] = [("capacity", "arm", "tokens kept", "bytes")]
    for window in capacities:
        kept = {arm: sum(equal_window(model, window)) for arm in arms_of(model)} | {"full": length}
        cell = {arm: {"tokens": n, "bytes": arm_bytes(model, arm, window, length)} for arm, n in kept.items()}
        results[f"{window[0]}+{window[1]}"] = cell
        rows += [(called(model, window), arm, f"{u['tokens']:,}", f"{u['bytes']:,}") for arm, u in cell.items()]
    tables.append(table(f"The cache of each arm, for a text of {length:,} tokens", rows))
    return results


def streaming(
    model: Any, documents: list[Tensor], options: argparse.Namespace, window: tuple[int, int], tables: list[str]
) -> Results:
    """Loss by position while the longest text streams by, cache bytes and peak memory along the way."""
    ids = max(documents, key=len)[: options.tokens + 1][None].to(options.device)
    readings: dict[str, Reading] = {}
    with torch.no_grad():
        model(ids[:, : options.chunk])  # warm up: the first arm pays neither for lazy loading nor for thread pools
    for arm in arms_of(model):
        name = {"full": "full attention", "window": "window only"}.get(arm, arm)
        with use_arm(model, arm, window):
            readings[name], _ = read(model, ids, options.chunk, name)
    title = f"Streaming {ids.shape[1] - 1:,} tokens, {called(model, window)}"
    tables.append(f"{title}\n{format_table(readings, sum(equal_window(model, window)))}")
    points = max(1, (ids.shape[1] - 1) // 256)
    return {
        name: {
            "positions": arm.positions, "cache_bytes": arm.cache_bytes, "peak_bytes": arm.peak_bytes,
            "seconds": arm.seconds, "loss_every": points,
            "losses": [float(part.mean()) for part in arm.losses.split(points)],
            "smooth": [u.tolist()[::points] for u in smooth(arm.losses, max(1, len(arm.losses) // 32))],
        }
        for name, arm in readings.items()
    }  # fmt: skip


def gaps(
    model: Any,
    documents: list[Tensor],
    options: argparse.Namespace,
    capacities: list[tuple[int, int]],
    tables: list[str],
) -> Results:
    """Mean loss beyond the capacity, and ``(window - memory) / (window - full)`` where there is a gap to close.

    A memory that is trained on the next token also adapts the model to its kind of text. What this text's own memory is
    worth is the difference to reading the memory of another text, half the list away.
    """
    found = stretches(documents, options.length, options.stretches)
    pieces = [piece["input_ids"][None].to(options.device) for piece in found]
    results, arms = Results(), arms_of(model)
    rows = [("capacity", *arms, "another text's memory", "window - full", "gap closed", "by this text's memory")]
    for window in capacities:
        start = max(sum(equal_window(model, window)), options.start)
        bar = tqdm(range(len(pieces)), desc=called(model, window), unit=" texts")
        cell = measure([stretch_losses(model, pieces, i, start, window) for i in bar])
        results[f"{window[0]}+{window[1]}"] = cell
        shares = [cell["verdict"], "-"]
        if cell["gap_closed"] is not None:
            shares = [with_error(100 * cell["gap_closed"], 100 * cell["standard_error"], ".1f", " %"), "-"]
            shares[1] = "-" if cell["by_own_memory"] is None else f"{100 * cell['by_own_memory']:.1f} %"
        means = ("-" if cell[arm] is None else f"{cell[arm]:.4f}" for arm in (*arms, "another_text"))
        measured = with_error(cell["window"] - cell["full"], cell["gap_error"], ".4f", "")
        rows.append((called(model, window), *means, measured, *shares))
    tables.append(
        table(
            f"{len(pieces)} stretches of {options.length:,} tokens, positions from max(capacity, {options.start:,}); "
            f"+- standard error.\nThe gap is significant if zero lies outside its 95 % interval (paired differences by "
            f"text, for few texts by segments of {SEGMENT} tokens).",
            rows,
        )
    )
    return results


def with_error(value: float, error: float | None, digits: str, unit: str) -> str:
    """A value with its standard error, where there is one."""
    return f"{value:{digits}}{unit}" + ("" if error is None else f" +- {error:{digits}}")


def spans(
    model: Any, documents: list[Tensor], options: argparse.Namespace, window: tuple[int, int], tables: list[str]
) -> Results:
    """Loss on spans of a text that come again at its end, after they have left the window of every arm."""
    rng, text = random.Random(options.seed), max(documents, key=len).to(options.device)
    bar = tqdm(range(options.spans), desc="spans", unit=" texts")
    results = measure_spans([span_losses(model, text, options.length, rng, window) for _ in bar])
    rows: list[tuple[str, ...]] = [("arm", "loss", "window - arm")]
    for arm, cell in results.items():
        gain = "-" if arm == "window" else with_error(cell["gain"], cell["gain_error"], ".4f", "")
        rows.append((arm, f"{cell['loss']:.4f}", gain))
    title = (
        f"{options.spans} spans of {SEGMENT} tokens that come again, evicted, at the end of {options.length:,} tokens"
    )
    tables.append(table(f"{title}, {called(model, window)}; +- standard error", rows))
    return results


def needles(
    model: Any,
    tokenizer: Any,
    documents: list[Tensor],
    options: argparse.Namespace,
    window: tuple[int, int],
    tables: list[str],
) -> Results:
    """Accuracy of each task and arm by the place of the needle; no average over places.

    Needles of slots and compressor are filed as those of the window that keeps as much: what is evicted has left every
    arm's window.
    """
    rng, arms, longest = random.Random(options.seed), arms_of(model), equal_window(model, window)
    haystack = max(documents, key=len).tolist()
    found: dict[str, dict[str, dict[str, list[Needle]]]] = {}

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    plan = [(task, i) for task in options.tasks or TASKS for i in range(options.needles)]
    for task, i in tqdm(plan, desc="needles", unit=" prompts"):
        start = rng.randrange(max(1, len(haystack) - options.needle_length))
        text, depth = haystack[start:] + haystack[:start], rng.random() if i % 4 else 0.0  # every fourth: the beginning
        recent = longest[0] // 2 if i % 4 == 3 else 0  # and every fourth inside the window
        example = make(task, encode, text, options.needle_length, depth, rng, recent=recent)
        for arm in arms:
            with use_arm(model, arm, window):
                for needle in score(model, example, options.chunk):
                    places = found.setdefault(task, {})
                    cell = places.setdefault(needle.place(len(example.prompt), *longest), {a: [] for a in arms})
                    cell[arm].append(needle)
    results: Results = {}
    rows = [("task", "needle in", "n", *arms, *(f"{arm} loss" for arm in arms))]
    for task, places in found.items():
        results[task] = {place: tally(places[place]) for place in sorted(places, key=rank)}
        for place, u in results[task].items():
            within = {arm: "-".join(f"{100 * edge:.0f}" for edge in u["interval"][arm]) for arm in arms}
            shares = (f"{100 * u[arm]:.0f} % ({within[arm]})" for arm in arms)
            rows.append((task, place, str(u["n"]), *shares, *(f"{u[f'{arm} loss']:.2f}" for arm in arms)))
    title = (
        f"Needles in {options.needle_length:,} tokens, {called(model, window)}: answers right (95 % interval, Wilson), "
        "and loss on the answer"
    )
    tables.append(table(title, rows))
    return results


def sinks(
    model: Any, documents: list[Tensor], options: argparse.Namespace, window: tuple[int, int], tables: list[str]
) -> Results:
    """Streaming loss of every arm but full attention under each way to position the sinks."""
    ids = max(documents, key=len)[: (options.tokens or options.length) + 1][None].to(options.device)
    edges = [0, sum(equal_window(model, window))]
    while edges[-1] < ids.shape[1] - 1:
        edges.append(min(ids.shape[1] - 1, 2 * edges[-1]))
    results: Results = {}
    rows = [("sinks", "arm", *(f"{a:,}-{b:,}" for a, b in pairwise(edges)))]
    for way in options.sink_positions:
        for arm in arms_of(model)[1:]:
            with positioned(model, way), use_arm(model, arm, window):
                losses = read(model, ids, options.chunk, f"{way} {arm}")[0].losses
            values = [float(losses[a:b].mean()) for a, b in pairwise(edges)]
            results[f"{way} {arm}"] = dict(zip(rows[0][2:], values, strict=True))
            rows.append((way, arm, *(f"{value:.4f}" for value in values)))
    tables.append(table(f"Positions of the sinks, {called(model, window)}", rows))
    return results


def plot(results: Results, path: Path) -> None:
    """Draw what was measured: loss and cache over position, gap closed, needles by place."""
    parts = [name for name in ("streaming", "gap", "needles") if name in results]
    if not parts:
        return
    figure = Figure(figsize=(5.5 * len(parts) + 3 * ("streaming" in parts), 4), layout="constrained")
    axes = list(figure.subplots(1, len(parts) + ("streaming" in parts), squeeze=False)[0])
    if "streaming" in parts:
        loss, cache = axes.pop(0), axes.pop(0)
        for name, arm in results["streaming"].items():
            loss.plot(*arm["smooth"], label=name)
            cache.plot(arm["positions"], [size / 1e6 for size in arm["cache_bytes"]], label=name)
        loss.set(xlabel="position, tokens", ylabel="loss, nats per token")
        cache.set(xlabel="position, tokens", ylabel="cache, MB", ylim=(0, None))
        loss.legend()
    if "gap" in parts:
        ax = axes.pop(0)
        bars = [100 * (cell["gap_closed"] or 0) for cell in results["gap"].values()]
        labels = [f"{name}\n{cell['verdict']}" for name, cell in results["gap"].items()]
        ax.bar(labels, bars)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(ylabel="gap closed, %", xlabel="window + sinks", ylim=(min(0, *bars) - 5, max(100, *bars)))
    if "needles" in parts:
        draw_needles(axes.pop(0), results["needles"])
    figure.savefig(path, dpi=120)


def draw_needles(ax: Any, tasks: Results) -> None:
    """Accuracy by place, all tasks pooled within a place."""
    places = sorted({place for cells in tasks.values() for place in cells}, key=rank)
    arms = list(next(cell["interval"] for cells in tasks.values() for cell in cells.values()))
    step = 0.81 / len(arms)
    for shift, arm in enumerate(arms):
        heights = []
        for place in places:
            cells = [cells[place] for cells in tasks.values() if place in cells]
            heights.append(100 * sum(c[arm] * c["n"] for c in cells) / sum(c["n"] for c in cells))
        left = step * (shift - (len(arms) - 1) / 2)
        ax.bar([i + left for i in range(len(places))], heights, width=0.93 * step, label=arm)
    ax.set_xticks(range(len(places)), [place.replace(", ", ",\n") for place in places], fontsize=7)
    ax.set(ylabel="answers right, %", ylim=(0, 100))
    ax.legend()


def capacity(text: str) -> tuple[int, int]:
    """``480+32`` as window and sinks."""
    window, _, sinks = text.partition("+")
    if not window.isdecimal() or not (sinks or "0").isdecimal() or int(window) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WINDOW+SINKS, such as 480+32")
    return int(window), int(sinks or 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    add("--adapter", required=True, help="trained memory: folder, file or hub id")
    add("--compressor", choices=sorted(Compressor.by_name), help="of released weights (default: GatedDeltaNet)")
    add("--text", type=Path, nargs="+", help="UTF-8 text files; default: the reference of the Python language")
    add("--tokens", type=count, default=16_384, help="length of the text that streams by")
    add("--chunk", type=positive, default=512, help="tokens per call")
    add("--capacities", type=capacity, nargs="+", help="such as 480+32 1920+128; default: the adapter's own")
    add("--stretches", type=count, default=8, help="stretches of text to measure the gap on")
    add("--length", type=positive, default=8192, help="tokens in each")
    add("--start", type=count, default=512, help="positions before this are never counted")
    add("--spans", type=count, default=0, help="texts of --length tokens at whose end an evicted span comes again")
    add("--needles", type=count, default=8, help="prompts for each needle task")
    add("--needle-length", type=positive, default=4096, help="tokens in each prompt")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=f"needle tasks (default: {', '.join(TASKS)})")
    add("--sink-positions", nargs="*", default=[], choices=["trained", "streaming", "absolute"], help="ways to compare")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", default="bfloat16" if gpu else "float32", choices=["float32", "bfloat16", "float16"])
    add("--output", type=Path, required=True, help="folder for results.json, results.txt, results.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
