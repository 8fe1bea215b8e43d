"""Draw the figures of README and benchmarks page from the tables of the documentation: no number is typed twice.

    python docs/figures.py

``assets/recall.png`` shows the first table of ``guides/recall.md``: right answers about facts that have left the
window, the three kinds of questions together, with the standard error of each share; and the bytes of the cache.
``assets/benchmarks.png`` shows the same answers, the bytes of a larger model's cache, which follow from its shape, and
the times of the table of prompts in ``benchmarks-details.md``. Each has a second form for narrow screens,
``recall-tall.png`` and ``benchmarks-tall.png``.
"""

import argparse
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ahn_layers import GatedDeltaNet, MemoryStore, Window

DOCS = Path(__file__).parent
LOOKS = runpy.run_path(str(DOCS.parent / "examples" / "looks.py"))["COLORS"]
COLORS = {
    "full attention": LOOKS["full"],
    "sinks + window": LOOKS["window"],
    "slots + GatedDeltaNet": LOOKS["memory"],
}
FULL_BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 2
"""SmolLM2-135M in bfloat16: layers, key/value heads, head size, keys and values, bytes a number."""
HELD_BYTES = {"sinks + window": 11_796_720, "slots + GatedDeltaNet": 17_409_135}
"""As ``memory_report`` prints them for the model in bfloat16 with 512 tokens kept."""
LARGER = {"hidden_size": 2048, "num_heads": 16, "num_kv_heads": 2, "head_dim": 128}
LARGER_LAYERS = 36
"""Qwen2.5-3B, whose times are in the table of prompts."""
LENGTHS = [1024 * 2**i for i in range(11)]
"""Of texts, up to a million tokens."""


Prompt = tuple[str, int, float]
"""An arm, the tokens of a prompt, the seconds in which it was read."""


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        group: number of the comparison, from 0; each begins with full attention.
        length: tokens in the text.
        kept: tokens kept.
        arm: name.
        answers: right answers and questions of each kind.
    """

    group: int
    length: int
    kept: int
    arm: str
    answers: tuple[tuple[int, int], ...]

    @property
    def share(self) -> float:
        """Right answers, in percent; all kinds count alike."""
        return 100 * sum(right / asked for right, asked in self.answers) / len(self.answers)

    @property
    def error(self) -> float:
        """Standard error of the share, in percent."""
        variances = [right / asked * (1 - right / asked) / asked for right, asked in self.answers]
        return 100 * sum(variances) ** 0.5 / len(self.answers)


def recall_table(text: str) -> list[Cell]:
    """The rows of the first table of ``guides/recall.md``; a row without questions of its own has those above it."""
    cells: list[Cell] = []
    group, asked = -1, [1, 1, 1]
    for line in text.split("| tokens in the text", 1)[1].split("\n\n", 1)[0].splitlines()[2:]:
        arm, length, kept, *answers = [re.sub(r"[*`,]", "", u).strip() for u in line.strip("|").split("|")]
        group += arm == "full attention"
        counts = [re.fullmatch(r"(\d+)(?: of (\d+))?", u) for u in answers[:3]]
        found = [u for u in counts if u]
        asked = [int(u[2] or before) for u, before in zip(found, asked, strict=True)]
        right = [int(u[1]) for u in found]
        cells.append(Cell(group, int(length), int(kept), arm, tuple(zip(right, asked, strict=True))))
    return cells


def draw_recall(cells: list[Cell], path: Path, *, tall: bool = False) -> None:
    """Shares of right answers by length, and the bytes of each cache.

    Args:
        cells: of the table.
        path: of the PNG.
        tall: one below the other, for a narrow screen.
    """
    figure = Figure(figsize=(4.8, 6.2) if tall else (9, 3.5), layout="constrained")
    panels = {"nrows": 2, "height_ratios": (3, 2)} if tall else {"ncols": 2, "width_ratios": (3, 2)}
    left, right = figure.subplots(**panels)
    _answers(left, cells)
    for arm, color in COLORS.items():
        right.plot(*_bytes(arm), color=color, label=arm)
    right.set(title="cache with 512 tokens kept, MB", xlabel="tokens in the text", xlim=(0, 33_500), ylim=(0, 800))
    right.set_xticks([0, 8_192, 16_384, 32_768], ["0", "8,192", "16,384", "32,768"], fontsize=8)
    right.grid(alpha=0.3)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _answers(axes: Any, cells: list[Cell]) -> None:
    """Bars of the shares of right answers."""
    for place, (arm, color) in enumerate(COLORS.items()):
        own = [cell for cell in cells if cell.arm == arm]
        at, shares = [cell.group + 0.27 * (place - 1) for cell in own], [cell.share for cell in own]
        bars = {"yerr": [cell.error for cell in own], "error_kw": {"lw": 0.8, "capsize": 2}}
        axes.bar(at, shares, 0.25, color=color, label=arm, **bars)
        for x, cell in zip(at, own, strict=True):
            axes.text(x, cell.share + cell.error + 1, f"{cell.share:.0f}", ha="center", fontsize=8)
    kept = [f"{cell.length:,}\n{cell.kept:,} kept" for cell in cells if cell.arm == "sinks + window"]
    axes.set_xticks(range(len(kept)), kept, fontsize=8)
    axes.set(title="right answers about evicted facts, %", ylim=(0, 120), xlabel="tokens in the text")
    axes.set_yticks(range(0, 101, 20))
    axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1.5, frameon=False, fontsize=8)


def prompt_table(text: str) -> list[Prompt]:
    """``(arm, tokens, seconds)`` of each row of the table of prompts in ``benchmarks-details.md``."""
    found = []
    for line in text.split("| arm | tokens | seconds", 1)[1].split("\n\n", 1)[0].splitlines()[2:]:
        arm, tokens, seconds, *_ = (u.strip() for u in line.strip("|").split("|"))
        name = "full attention" if arm.startswith("full") else "memory"
        found.append((name, int(tokens.replace(",", "")), float(seconds)))
    return found


def larger_bytes(kept: int | None, length: int) -> int:
    """Bytes of the cache of Qwen2.5-3B's shape in bfloat16.

    Args:
        kept: sinks and window, of which 128 are sinks, when the window is full; None for full attention.
        length: tokens read, of which the bounded cache is independent.
    """
    like = torch.empty((), dtype=torch.bfloat16, device="meta")
    if kept is None:
        return length * LARGER_LAYERS * 2 * LARGER["num_kv_heads"] * LARGER["head_dim"] * like.itemsize
    with torch.device("meta"):
        store = MemoryStore(Window(kept - 128, num_sinks=128), GatedDeltaNet(**LARGER))
    return LARGER_LAYERS * int(store.bytes_per_row(like, **LARGER, value_dim=LARGER["head_dim"]))


def draw_benchmarks(cells: list[Cell], prompts: list[Prompt], path: Path, *, tall: bool = False) -> None:
    """Right answers, bytes and times, each over the length of the text.

    Args:
        cells: of the table of answers.
        prompts: arm, tokens and seconds.
        path: of the PNG.
        tall: one below the other, for a narrow screen.
    """
    figure = Figure(figsize=(4.8, 8.4) if tall else (12, 3.5), layout="constrained")
    panels = {"nrows": 3, "height_ratios": (3, 2, 2)} if tall else {"ncols": 3, "width_ratios": (5, 3, 3)}
    answers, held, times = figure.subplots(**panels)
    _answers(answers, cells)
    for label, kept, color, line in (
        ("full attention", None, LOOKS["full"], "-"),
        ("memory, 32,768 kept", 32_768, LOOKS["memory"], "-"),
        ("memory, 8,192 kept", 8_192, LOOKS["memory"], "--"),
    ):
        lengths = [u for u in LENGTHS if u >= (kept or 0)]
        held.plot(lengths, [larger_bytes(kept, u) / 1e9 for u in lengths], line, color=color, label=label)
    for arm, marker in (("full attention", "s"), ("memory", "o")):
        own = sorted((tokens, seconds) for name, tokens, seconds in prompts if name == arm)
        times.plot(*zip(*own, strict=True), f"{marker}-", color=LOOKS["full" if arm != "memory" else arm], label=arm)
        for tokens, seconds in own:
            beside = {"textcoords": "offset points", "xytext": (-6, 5), "ha": "right", "fontsize": 8}
            times.annotate(f"{seconds:g}", (tokens, seconds), **beside)
    for axes in (held, times):
        axes.set(xscale="log", yscale="log", xlabel="tokens in the text")
        axes.legend(loc="upper left", frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    held.set(title="3B model: cache, GB", xlim=(LENGTHS[0], 1.2 * LENGTHS[-1]), ylim=(0.03, 150))
    held.set_xticks([2**11, 2**14, 2**17, 2**20], ["2,048", "16,384", "131,072", "1,048,576"], fontsize=8)
    held.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    times.set(title="3B model: seconds to read it", xlim=(2**14, 2**20.5), ylim=(1, 100))
    times.set_xticks([2**15, 2**17, 2**20], ["32,768", "131,072", "1,048,576"], fontsize=8)
    times.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    for axes in (answers, held, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    figure.savefig(path, dpi=140)


def _bytes(arm: str) -> tuple[list[int], list[float]]:
    """Tokens and megabytes, with 512 tokens kept."""
    lengths = [0, 512, 32_768]
    if arm == "full attention":
        return lengths, [length * FULL_BYTES_PER_TOKEN / 1e6 for length in lengths]
    return lengths, [0, *[HELD_BYTES[arm] / 1e6] * 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the figures of README and benchmarks page.")
    parser.add_argument("--output", type=Path, default=DOCS / "assets", help="folder of the pictures")
    folder = parser.parse_args().output
    found = recall_table((DOCS / "guides" / "recall.md").read_text())
    draw_recall(found, folder / "recall.png")
    draw_recall(found, folder / "recall-tall.png", tall=True)
    read = prompt_table((DOCS / "benchmarks-details.md").read_text())
    draw_benchmarks(found, read, folder / "benchmarks.png")
    draw_benchmarks(found, read, folder / "benchmarks-tall.png", tall=True)
