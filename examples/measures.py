"""The parts of ``evaluate.py``: each measures all arms of a model and adds a table."""

import argparse
import random
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import torch
from arms import arm_bytes, called, equal_window, positioned, use_arm
from gap import SEGMENT, measure, measure_spans, span_losses, stretch_losses
from needle_tasks import TASKS
from needles import Example, Needle, make, rank, score_all, tally
from quickstart import Reading, format_table, read, smooth
from texts import stretches
from torch import Tensor
from tqdm import tqdm

Results = dict[str, Any]
EVICTED = "evicted, at any distance"
"""The place of all needles that were evicted, where all were meant to be."""


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
    by_length = options.stretches or options.spans or options.sink_positions
    length = max(*lengths, options.length if by_length else 0)
    results: Results = {}
    rows: list[tuple[str, ...]] = [("capacity", "arm", "tokens kept", "bytes")]
    for window in capacities:
        kept = {arm: sum(equal_window(model, window)) for arm in options.arms} | {"full": length}
        cell = {arm: {"tokens": n, "bytes": arm_bytes(model, arm, window, length)} for arm, n in kept.items()}
        results[f"{window[0]}+{window[1]}"] = cell
        rows += [(called(model, window), arm, f"{u['tokens']:,}", f"{u['bytes']:,}") for arm, u in cell.items()]
    tables.append(table(f"The cache of each arm, for a text of {length:,} tokens", rows))
    return results


def streaming(
    model: Any, documents: list[Tensor], options: argparse.Namespace, window: tuple[int, int], tables: list[str]
) -> Results:
    """Loss by position while the longest text streams by, cache bytes and peak memory along the way."""
    ids = beginning(documents, options, options.tokens + 1)
    readings: dict[str, Reading] = {}
    with torch.no_grad():
        model(ids[:, : options.chunk])  # warm up: the first arm pays neither for lazy loading nor for thread pools
    for arm in options.arms:
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


def beginning(documents: list[Tensor], options: argparse.Namespace, length: int) -> Tensor:
    """The first tokens of the longest text, shape (1, T)."""
    first = torch.tensor(options.begin, dtype=torch.long)
    return torch.cat((first, max(documents, key=len)[: length - len(first)]))[None].to(options.device)


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
    found = stretches(documents, options.length, options.stretches, options.begin)
    pieces = [piece["input_ids"][None].to(options.device) for piece in found]
    results, arms = Results(), options.arms
    rows = [("capacity", *arms, "another text's memory", "window - full", "gap closed", "by this text's memory")]
    for window in capacities:
        start = max(sum(equal_window(model, window)), options.start)
        bar = tqdm(range(len(pieces)), desc=called(model, window), unit=" texts")
        cell = measure([stretch_losses(model, pieces, i, start, window, options.arms) for i in bar])
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
    results = measure_spans(
        [span_losses(model, text, options.length, rng, window, options.begin, options.arms) for _ in bar]
    )
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
    arms, longest = options.arms, equal_window(model, window)
    plan = [(task, i) for task in options.tasks or TASKS for i in range(options.needles)]
    found: dict[str, dict[str, dict[str, list[Needle]]]] = {}
    examples = prompts(tokenizer, documents, options, longest, plan)
    with tqdm(total=len(plan), desc="needles", unit=" prompts") as bar:
        while batch := list(islice(examples, options.batch)):
            for arm in arms:
                with use_arm(model, arm, window):
                    scored = score_all(model, batch, options.chunk)
                for example, own in zip(batch, scored, strict=True):
                    for needle in own:
                        place = needle.place(len(example.prompt), *longest)
                        every = [EVICTED] if options.evicted and place.startswith("evicted") else []
                        for name in (place, *every):
                            cell = found.setdefault(example.task, {}).setdefault(name, {a: [] for a in arms})
                            cell[arm].append(needle)
            bar.update(len(batch))
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


def prompts(
    tokenizer: Any,
    documents: list[Tensor],
    options: argparse.Namespace,
    window: tuple[int, int],
    plan: list[tuple[str, int]],
) -> Iterator[Example]:
    """Needles in the longest text, at all depths, or with ``--evicted`` outside sinks and window.

    Args:
        tokenizer: of the model.
        documents: the texts.
        options: the command line.
        window: ``(window_size, num_sinks)`` of the arms that keep most.
        plan: task and number of each prompt.
    """
    rng, haystack = random.Random(options.seed), max(documents, key=len).tolist()
    length, evicted = options.needle_length, window if options.evicted else None

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    for task, i in plan:
        start = rng.randrange(max(1, len(haystack) - length))
        text, recent = haystack[start:] + haystack[:start], 0
        depth = rng.random() if evicted or i % 4 else 0.0  # every fourth: the beginning
        if not evicted and i % 4 == 3:  # and every fourth inside the window
            recent = window[0] // 2
        yield make(task, encode, text, length, depth, rng, recent=recent, evicted=evicted, begin=options.begin)


def sinks(
    model: Any, documents: list[Tensor], options: argparse.Namespace, window: tuple[int, int], tables: list[str]
) -> Results:
    """Streaming loss of every arm but full attention under each way to position the sinks."""
    ids = beginning(documents, options, (options.tokens or options.length) + 1)
    edges = [0, sum(equal_window(model, window))]
    while edges[-1] < ids.shape[1] - 1:
        edges.append(min(ids.shape[1] - 1, 2 * edges[-1]))
    results: Results = {}
    rows = [("sinks", "arm", *(f"{a:,}-{b:,}" for a, b in pairwise(edges)))]
    for way in options.sink_positions:
        for arm in options.arms[1:]:
            with positioned(model, way), use_arm(model, arm, window):
                losses = read(model, ids, options.chunk, f"{way} {arm}")[0].losses
            values = [float(losses[a:b].mean()) for a, b in pairwise(edges)]
            results[f"{way} {arm}"] = dict(zip(rows[0][2:], values, strict=True))
            rows.append((way, arm, *(f"{value:.4f}" for value in values)))
    tables.append(table(f"Positions of the sinks, {called(model, window)}", rows))
    return results
