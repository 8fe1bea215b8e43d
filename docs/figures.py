"""Draw the figures of README and benchmarks page from the tables of the documentation: no number is typed twice.

    python docs/figures.py

``assets/recall.png``, and ``recall-tall.png`` for narrow screens, show the first table of ``guides/recall.md``: right
answers about facts that have left the window, the three kinds of questions together, with the standard error of each
share; and the bytes of the cache.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parent
COLORS = {"full attention": "tab:gray", "sinks + window": "tab:orange", "slots + GatedDeltaNet": "tab:blue"}
FULL_BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 2
"""SmolLM2-135M in bfloat16: layers, key/value heads, head size, keys and values, bytes a number."""
HELD_BYTES = {"sinks + window": {512: 11_796_720, 1024: 23_593_200},
              "slots + GatedDeltaNet": {512: 17_592_810, 1024: 30_817_770}}  # fmt: skip
"""As ``memory_report`` prints them for the model in bfloat16, by tokens kept."""


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        group: number of the comparison, from 0; each begins with full attention.
        length: tokens in the text.
        kept: tokens kept.
        arm: name.
        right: right answers of all three kinds.
        asked: questions of all three kinds.
    """

    group: int
    length: int
    kept: int
    arm: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right answers, in percent."""
        return 100 * self.right / self.asked

    @property
    def error(self) -> float:
        """Standard error of the share, in percent."""
        return (self.share * (100 - self.share) / self.asked) ** 0.5


def recall_table(text: str) -> list[Cell]:
    """The rows of the first table of ``guides/recall.md``; a row without questions of its own has those above it."""
    cells: list[Cell] = []
    group = asked = -1
    for line in text.split("| tokens in the text", 1)[1].split("\n\n", 1)[0].splitlines()[2:]:
        arm, length, kept, *answers = [re.sub(r"[*`,]", "", u).strip() for u in line.strip("|").split("|")]
        group += arm == "full attention"
        counts = [re.fullmatch(r"(\d+)(?: of (\d+))?", u) for u in answers[:3]]
        asked = sum(int(u[2]) for u in counts if u and u[2]) or asked
        cells.append(Cell(group, int(length), int(kept), arm, sum(int(u[1]) for u in counts if u), asked))
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
    for place, (arm, color) in enumerate(COLORS.items()):
        own = [cell for cell in cells if cell.arm == arm]
        at, shares = [cell.group + 0.27 * (place - 1) for cell in own], [cell.share for cell in own]
        bars = {"yerr": [cell.error for cell in own], "error_kw": {"lw": 0.8, "capsize": 2}}
        left.bar(at, shares, 0.25, color=color, label=arm, **bars)
        for x, cell in zip(at, own, strict=True):
            left.text(x, cell.share + cell.error + 1, f"{cell.share:.0f}", ha="center", fontsize=8)
        right.plot(*_bytes(arm), color=color, label=arm)
    kept = [f"{cell.length:,}\n{cell.kept:,} kept" for cell in cells if cell.arm == "sinks + window"]
    left.set_xticks(range(len(kept)), kept, fontsize=8)
    left.set(title="right answers about evicted facts, %", ylim=(0, 100), xlabel="tokens in the text")
    left.legend(loc="upper right", frameon=False, fontsize=8)
    right.set(title="cache with 1,024 tokens kept, MB", xlabel="tokens in the text", xlim=(0, 33_500), ylim=(0, 800))
    right.set_xticks([0, 8_192, 16_384, 32_768], ["0", "8,192", "16,384", "32,768"], fontsize=8)
    right.grid(alpha=0.3)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _bytes(arm: str) -> tuple[list[int], list[float]]:
    """Tokens and megabytes, with 1,024 tokens kept."""
    lengths = [0, 1_024, 32_768]
    if arm == "full attention":
        return lengths, [length * FULL_BYTES_PER_TOKEN / 1e6 for length in lengths]
    return lengths, [0, *[HELD_BYTES[arm][1024] / 1e6] * 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the figures of README and benchmarks page.")
    parser.add_argument("--output", type=Path, default=DOCS / "assets", help="folder of the pictures")
    folder = parser.parse_args().output
    found = recall_table((DOCS / "guides" / "recall.md").read_text())
    draw_recall(found, folder / "recall.png")
    draw_recall(found, folder / "recall-tall.png", tall=True)
