"""What ``compare_compressors.py`` found, as a table and as a picture."""

import argparse
from pathlib import Path

from gpu_measurements import Results
from matplotlib.figure import Figure


def title_of(results: Results, options: argparse.Namespace, held_out: int) -> str:
    """What the table is of."""
    losses = results["references"]
    return (
        f"{options.steps} steps of {options.batch} x {options.length:,} tokens; window {options.window}, sinks "
        f"{options.sinks}; held out {held_out} texts of {options.length:,} tokens, loss "
        f"{losses['full']['loss']:.4f} with full attention, {losses['window']['loss']:.4f} with the window; "
        f"{results['device']}, {options.dtype}, {results['date']}; {results['seconds']:.0f} s; +- standard error"
    )


def rows_of(results: Results) -> list[tuple[str, ...]]:
    """The table, the heading first."""
    rows: list[tuple[str, ...]] = [
        ("compressor", "gap closed", "by this text's memory", "span, nats", "needle, nats", "right", "memory, bytes",
         "of it with the window", "parameters", "training, tokens/s", "decode, ms"),
    ]  # fmt: skip
    for arm in ("full", "window"):
        u = results["references"][arm]
        rows.append((f"({arm})", *["-"] * 4, f"{100 * u['right']:.0f} %", *["-"] * 4, optional(u["decode_ms"], ".1f")))
    for name, u in results["compressors"].items():
        gap, spans, needles = u["gap"], u.get("spans"), u.get("needles")
        rows.append((
            name,
            *(optional(gap[key], ".1f", " %", 100, error) for key, error in
              (("gap_closed", gap["standard_error"]), ("by_own_memory", None))),
            "-" if spans is None else optional(spans["memory"]["gain"], ".3f", "", 1, spans["memory"]["gain_error"]),
            "-" if needles is None else optional(needles["gain"], ".3f", "", 1, needles["gain_error"]),
            "-" if needles is None else f"{100 * needles['right']:.0f} %",
            f"{u['memory_bytes']:,}", f"{u['gate_bytes']:,}", f"{u['parameters']:,}",
            f"{u['train_tokens_per_second']:,.0f}", optional(u["decode_ms"], ".1f"),
        ))  # fmt: skip
    return rows


def optional(value: float | None, digits: str, unit: str = "", factor: float = 1, error: float | None = None) -> str:
    """A number that may be missing, with its standard error where there is one."""
    if value is None:
        return "-"
    return f"{factor * value:{digits}}{unit}" + ("" if error is None else f" +- {factor * error:{digits}}")


def plot(results: Results, path: Path) -> None:
    """Share of the gap and gain on spans over the bytes of the memory."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for ax, (title, value) in zip(
        figure.subplots(1, 2),
        {
            "share of the gap closed, %": lambda u: 100 * (u["gap"]["gap_closed"] or 0),
            "gain on repeated spans, nats": lambda u: u["spans"]["memory"]["gain"] if "spans" in u else 0,
        }.items(),
        strict=True,
    ):
        for name, u in results["compressors"].items():
            ax.plot(u["memory_bytes"] / 2**20, value(u), "o")
            ax.annotate(f" {name}", (u["memory_bytes"] / 2**20, value(u)), fontsize=8)
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set(title=title, xlabel="memory of one sequence beyond its window, MiB", xscale="log")
    figure.savefig(path, dpi=120)
