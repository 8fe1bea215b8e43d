"""What a memory keeps, as a page of HTML and as a picture."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from kept import KeptTokens
from kept_text import describe, printable
from matplotlib.figure import Figure
from matplotlib.patches import Patch

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>What is kept</title>
<style>
:root { color-scheme: light dark; --sinks: 46 160 67; --window: 60 130 230; --slots: 240 125 0; }
@media (prefers-color-scheme: dark) { :root { --sinks: 40 120 60; --window: 45 85 150; --slots: 200 90 0; } }
body { background: Canvas; color: CanvasText; font: 16px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
  padding: 0 1em; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 14px; }
.sinks { background: rgb(var(--sinks) / .5); }
.window { background: rgb(var(--window) / .3); }
.slots { background: rgb(var(--slots) / var(--a)); }
.evicted { opacity: .65; }
#text span:hover { outline: 1px solid; }
</style>
<h1>What is kept</h1>
<p>$facts.</p>
<p><span class="sinks">&nbsp;sinks&nbsp;</span> <span class="window">&nbsp;window&nbsp;</span>
<span class="slots" style="--a:.2">&nbsp;in slots of few&nbsp;</span>
<span class="slots" style="--a:.8">&nbsp;of all heads&nbsp;</span>
<span class="evicted">&nbsp;evicted, in no slot&nbsp;</span>
For a single head, the shade shows the order of priority.</p>
<p><label>Slots of <select id="head"><option value="">all heads</option>$options</select></label></p>
<div id="text" dir="auto">$text</div>
<script type="application/json" id="rows">$rows</script>
<script>
const spans = document.querySelectorAll("#text span");
const shares = Array.from(spans, span => span.style.getPropertyValue("--a"));
const rows = JSON.parse(document.getElementById("rows").textContent);
const head = document.getElementById("head");
function shade() {
  const row = head.value === "" ? null : rows[head.value];
  spans.forEach((span, rank) => {
    if (span.className === "slots") span.style.setProperty("--a", row === null ? shares[rank] : row[rank] ?? 0);
  });
}
head.addEventListener("change", shade);
shade();  // a browser may remember the choice
</script>
</html>
""")


def to_html(found: KeptTokens, pieces: Sequence[str]) -> str:
    """The marked text as a page of HTML that needs no other file.

    Args:
        found: what is kept.
        pieces: the text of each token.
    """
    spans = []
    for rank, (mark, share, piece) in enumerate(zip(found.marks, found.share.tolist(), pieces, strict=True)):
        kind = "slots" if mark.isdecimal() else mark or "evicted"
        shown = printable(piece).replace("\n", "↵\n") if kind == "slots" else printable(piece)
        shade = f' style="--a:{_alpha(math.sqrt(share))}"' if kind == "slots" else ""
        title = escape(_title(found, rank, piece, kind, share)).replace("\n", "&#10;")
        spans.append(f'<span class="{kind}"{shade} title="{title}">{escape(shown)}</span>')
    rows, options, order = [], [], found.order
    for i, (place, head) in enumerate(found.rows):
        ranks = found.kept[place, head].nonzero().flatten().tolist()
        rows.append({rank: _alpha(float(order[place, head, rank])) for rank in ranks})
        options.append(f'<option value="{i}">layer {found.layers[place]}, head {head}</option>')
    return PAGE.substitute(
        facts=escape(describe(found)), options="".join(options), text="".join(spans), rows=json.dumps(rows)
    )


def _alpha(strength: float) -> float:
    """Opacity of a shade that is visible and leaves the text readable."""
    return round(0.15 + 0.65 * strength, 3)


def _title(found: KeptTokens, rank: int, piece: str, kind: str, share: float) -> str:
    """What a token says when the pointer is over it."""
    where = {"sinks": "a sink", "window": "in the window", "slots": "in slots", "evicted": "evicted, in no slot"}[kind]
    lines = [f"{piece!r}, rank {rank:,}", f"{where}: seen without loss by {100 * share:.1f} % of the heads"]
    for layer, heads in found.keepers(rank):
        lines.append(f"layer {layer}: " + ", ".join(f"head {head} priority {value:.4g}" for head, value in heads))
    return "\n".join(lines)


def plot(found: KeptTokens, path: Path) -> None:
    """Draw the kept tokens of each head over their rank, sinks and window shaded.

    Args:
        found: what is kept.
        path: of the picture.
    """
    rows = found.rows
    figure = Figure(figsize=(10, min(14, 2.2 + 0.12 * len(rows))), layout="constrained")
    axes = figure.subplots()
    spans = {"sinks": ("tab:green", found.sinks), "window": ("tab:blue", found.recent)}
    shades = []
    for name, (color, where) in spans.items():
        ranks = where.nonzero().flatten().tolist()
        if ranks:
            axes.axvspan(ranks[0] - 0.5, ranks[-1] + 0.5, color=color, alpha=0.25, linewidth=1)
            shades.append(Patch(color=color, alpha=0.25, label=name))
    ranks, heights, colors, order = [], [], [], found.order
    for y, (place, head) in enumerate(rows):
        where = found.kept[place, head].nonzero().flatten()
        ranks += where.tolist()
        heights += [y] * len(where)
        colors += order[place, head, where].tolist()
    dots = axes.scatter(ranks, heights, c=colors, s=8, vmin=0, vmax=1, cmap="viridis", linewidths=0)
    figure.colorbar(dots, ax=axes, label="order of priority in the head, 1 is highest", aspect=60, pad=0.01)
    every = len(rows) <= 24
    ticks = [y for y, (_, head) in enumerate(rows) if every or head == 0]
    names = [f"{found.layers[place]}" + (f" / {head}" if every else "") for place, head in (rows[y] for y in ticks)]
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set(xlabel="rank of the token", ylabel="layer / key/value head" if every else "layer, a line for each head")
    axes.set_xlim(-0.5, found.seen - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.legend(handles=shades, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
