"""Show which tokens of a text a memory with slots keeps without loss, in each layer and key/value head.

    python examples/what_is_kept.py    # SmolLM2-135M-Instruct, 64 slots for the largest values, 15 seconds
    python examples/what_is_kept.py --score key_norm --tokens 4096 --html kept.html --plot kept.png

The text is printed with sinks, window and kept tokens marked, then a table of all heads. ``--html`` writes the text as
a page, on which each token says which heads keep it; ``--plot`` draws the kept tokens of each head over their rank.
With ``--adapter`` the slots are those of a trained memory.
"""

import argparse
import json
import math
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import torch
from _common import count, find_adapter, give_memory, number, positive
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from quickstart import load_text
from smollm2 import load_causal_lm
from torch import Tensor
from tqdm import tqdm

from ahn_layers import HippocampalAttention, HippocampalCache, MemoryState, SalientSlots, Window, retrofit
from ahn_layers.evictions.scores import UNTRAINED

WINDOW, SINKS, SLOTS, SCORE = 256, 4, 64, "value_norm"
"""Without an adapter: small sizes, so that a short text shows something."""
RANK, PRIORITY = "gates.eviction.rank", "gates.eviction.priority"
"""Among what ``SalientSlots`` keeps: number and priority of each kept token."""
LEVELS = (0.05, 0.2, 0.5, 1.0)
"""Shades of kept tokens: the largest share of heads of each."""
STYLES = {
    "sinks": ("30;48;5;151", "sinks"),
    "window": ("30;48;5;153", "window"),
    **{
        str(i): (f"30;48;5;{color}", f"in slots of up to {100 * share:.0f} % of the heads")
        for i, (share, color) in enumerate(zip(LEVELS, (230, 222, 215, 208), strict=True), 1)
    },
    "": ("2", "evicted, in no slot"),
}
"""ANSI style and meaning of each mark."""


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Which tokens of a text each key/value head sees without loss, once ``T`` tokens have been read.

    Attributes:
        layers: indices of the ``L`` layers that have slots. Other layers are left out.
        heads: key/value heads of each of these layers.
        slots: slots of each head, by layer.
        kept: True where a head keeps a token in a slot, shape (L, G, T) with the largest number of heads ``G``.
        priority: of kept tokens, NaN elsewhere, same shape.
        window: sinks and window, which every head sees.
    """

    layers: list[int]
    heads: list[int]
    slots: list[int]
    kept: Tensor
    priority: Tensor
    window: Window

    @property
    def seen(self) -> int:
        """Tokens read."""
        return self.kept.shape[2]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Place among the layers and number of each head."""
        return [(place, head) for place, heads in enumerate(self.heads) for head in range(heads)]

    @property
    def sinks(self) -> Tensor:
        """True at sinks, shape (T,)."""
        return torch.arange(self.seen) < self.window.num_sinks

    @property
    def recent(self) -> Tensor:
        """True at tokens in the window, shape (T,)."""
        return (torch.arange(self.seen) >= self.seen - self.window.window_size) & ~self.sinks

    @property
    def share(self) -> Tensor:
        """Share of the heads that see each token without loss, shape (T,): 1 for sinks and window."""
        in_slots = self.kept.sum(dim=(0, 1)) / len(self.rows)
        return in_slots.masked_fill(self.sinks | self.recent, 1.0)

    @property
    def order(self) -> Tensor:
        """Place of each kept token in its head's order of priority, up to 1 for the highest; NaN where not kept.

        Priorities of different heads have different scales, so pictures show this.
        """
        place = self.priority.argsort(dim=2, stable=True).argsort(dim=2) + 1  # NaN comes last
        return (place / self.kept.sum(dim=2, keepdim=True)).masked_fill(~self.kept, math.nan)

    @property
    def marks(self) -> list[str]:
        """The key of ``STYLES`` for each token."""
        levels = torch.bucketize(self.share, torch.tensor(LEVELS)) + (self.share > 0)
        kinds = zip(self.sinks.tolist(), self.recent.tolist(), levels.tolist(), strict=True)
        return ["sinks" if sink else "window" if recent else str(level or "") for sink, recent, level in kinds]

    def keepers(self, rank: int) -> Iterator[tuple[int, list[tuple[int, float]]]]:
        """For each layer that keeps a token: its index, and its heads with their priorities."""
        for layer, kept, priority in zip(self.layers, self.kept[:, :, rank], self.priority[:, :, rank], strict=True):
            heads = kept.nonzero().flatten().tolist()
            if heads:
                yield layer, [(head, float(priority[head])) for head in heads]


def kept_tokens(cache: Any, row: int = 0) -> KeptTokens:
    """Read from a cache which tokens are kept.

    Args:
        cache: of a model whose memory has ``SalientSlots``, after it has read a text.
        row: which text of the batch; its tokens are counted without padding.

    Raises:
        ValueError: if no layer has slots, or nothing has been read.
    """
    states = {i: getattr(layer, "state", None) for i, layer in enumerate(cache.layers)}
    found = {i: u for i, u in states.items() if isinstance(u, MemoryState) and {RANK, PRIORITY} <= u.kept.keys()}
    if not found:
        raise ValueError(
            "no layer of this cache has slots. Retrofit the model with eviction=SalientSlots(...), then let it read a "
            "text."
        )
    first = next(iter(found.values()))
    heads = [len(state.kept["filled"][row]) for state in found.values()]
    shape = (len(found), max(heads), int(first.seen[row]))
    kept, priority = torch.zeros(shape, dtype=torch.bool), torch.full(shape, math.nan)
    for place, state in enumerate(found.values()):
        filled, ranks, values = (state.kept[name][row].cpu() for name in ("filled", RANK, PRIORITY))
        for head, size in enumerate(filled.tolist()):
            kept[place, head, ranks[head, :size]] = True
            priority[place, head, ranks[head, :size]] = values[head, :size].float()
    slots = [state.kept[RANK].shape[2] for state in found.values()]
    return KeptTokens(list(found), heads, slots, kept, priority, first.window)


@torch.no_grad()
def read(model: Any, ids: Tensor, chunk: int) -> HippocampalCache:
    """Let a model read a text, chunk by chunk.

    Args:
        model: a retrofitted causal language model of transformers.
        ids: token ids, shape (1, T).
        chunk: tokens per call.
    """
    cache = HippocampalCache()
    with tqdm(total=ids.shape[1], desc="reading", unit=" tokens") as bar:
        for part in ids.split(chunk, dim=1):
            model(part, cache=cache, use_cache=True, logits_to_keep=1)
            bar.update(part.shape[1])
    return cache


def split_text(tokenizer: Any, text: str, most: int) -> tuple[list[int], list[str]]:
    """The first tokens of a text, and the piece of the text that each of them stands for.

    A character of several tokens goes to the first of them; the others show as a dot. Special tokens show their names.

    Args:
        tokenizer: of transformers.
        text: the text.
        most: number of tokens.
    """
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded.input_ids[:most]
    if not tokenizer.is_fast:
        return ids, [tokenizer.decode([i]) or "·" for i in ids]
    pieces, start = [], 0
    for i, (_, end) in zip(ids, encoded.offset_mapping, strict=False):
        name = tokenizer.convert_ids_to_tokens(i) if i in tokenizer.all_special_ids else "·"
        pieces.append(text[start:end] or name)
        start = max(start, end)
    return ids, pieces


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def mark_text(found: KeptTokens, pieces: Sequence[str], *, color: bool = False) -> str:
    """The text with every token marked: what it stands in, and by how many heads it is kept.

    Args:
        found: what is kept.
        pieces: the text of each token.
        color: mark by ANSI colours instead of brackets, ``[2|such as these]``.
    """
    parts = []
    for mark, tokens in groupby(zip(found.marks, pieces, strict=True), key=lambda token: token[0]):
        text = printable("".join(piece for _, piece in tokens))
        if mark.isdecimal():  # a kept newline has to be visible
            text = text.replace("\n", "\\n\n")
        parts.append(_marked(text, mark, color))
    return "".join(parts)


def legend(color: bool = False) -> str:
    """What the marks of ``mark_text`` mean."""
    if color:
        return "  ".join(_marked(f" {meaning} ", mark, color) for mark, (_, meaning) in STYLES.items())
    return "\n".join(f"{f'[{mark}|...]' if mark else '...':<14}{meaning}" for mark, (_, meaning) in STYLES.items())


def _marked(text: str, mark: str, color: bool) -> str:
    if color:  # line by line: some terminals paint the rest of a line
        begin = f"\x1b[{STYLES[mark][0]}m"
        return "\n".join(f"{begin}{line}\x1b[0m" if line else "" for line in text.split("\n"))
    return f"[{mark}|{text}]" if mark else text


def format_table(found: KeptTokens, pieces: Sequence[str], top: int = 5) -> str:
    """Slots filled, oldest kept token, median age and the tokens of highest priority, of each head.

    The age of a token is the number of tokens read after it. Equal tokens are shown once, with their number.

    Args:
        found: what is kept.
        pieces: the text of each token.
        top: how many different tokens of highest priority.
    """
    rows = [("layer", "head", "filled", "oldest", "token", "median age", "highest priority")]
    for place, head in found.rows:
        ranks = found.kept[place, head].nonzero().flatten()
        best = ranks[found.priority[place, head, ranks].argsort(descending=True, stable=True)].tolist()
        oldest, token, age = "-", "", "-"
        if best:
            oldest, token = f"{min(best):,}", _quoted(pieces[min(best)])
            age = f"{(found.seen - 1 - ranks).double().quantile(0.5).item():,.0f}"
        times = Counter(pieces[rank] for rank in best)  # in the order of priority
        names = " ".join(_quoted(piece) + (f" x{n}" if n > 1 else "") for piece, n in list(times.items())[:top])
        filled = f"{len(best)}/{found.slots[place]}"
        rows.append((str(found.layers[place]), str(head), filled, oldest, token, age, names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = (">", ">", ">", ">", "<", ">", "<")
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    ]
    lines.insert(1, "-" * len(lines[1]))
    return "\n".join(line.rstrip() for line in lines)


def _quoted(piece: str) -> str:
    """A token in quotation marks, newlines and the like as escapes."""
    return repr(piece if len(piece) <= 16 else f"{piece[:13]}...")


def describe(found: KeptTokens) -> str:
    """The sizes, in one sentence."""
    slots = "-".join(f"{u:,}" for u in sorted({min(found.slots), max(found.slots)}))
    layers = "1 layer" if len(found.layers) == 1 else f"{len(found.layers)} layers"
    return (
        f"{found.seen:,} tokens read, {found.window.num_sinks:,} sinks, a window of {found.window.window_size:,}, "
        f"{slots} slots in each of {len(found.rows)} key/value heads ({layers})"
    )


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
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", default="bfloat16" if gpu else "float32", choices=["float32", "bfloat16", "float16"])
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
    try:
        model, ids, pieces = load(args)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"what_is_kept: {' '.join(str(error).split())}") from None
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
