"""Pictures of what ``evaluate.py`` measured."""

from pathlib import Path
from typing import Any

from looks import color, look
from matplotlib.figure import Figure
from needles import rank

Results = dict[str, Any]


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
            loss.plot(*arm["smooth"], **look(name))
            cache.plot(arm["positions"], [size / 1e6 for size in arm["cache_bytes"]], **look(name))
        loss.set(xlabel="position, tokens", ylabel="loss, nats per token")
        cache.set(xlabel="position, tokens", ylabel="cache, MB", ylim=(0, None))
        loss.legend()
    if "gap" in parts:
        ax = axes.pop(0)
        bars = [100 * (cell["gap_closed"] or 0) for cell in results["gap"].values()]
        labels = [f"{name}\n{cell['verdict']}" for name, cell in results["gap"].items()]
        ax.bar(labels, bars, color=color("memory"))
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
        ax.bar([i + left for i in range(len(places))], heights, width=0.93 * step, **look(arm))
    ax.set_xticks(range(len(places)), [place.replace(", ", ",\n") for place in places], fontsize=7)
    ax.set(ylabel="answers right, %", ylim=(0, 100))
    ax.legend()
