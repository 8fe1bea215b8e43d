"""What a memory keeps, as text: marked for a terminal, and a table of all heads."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from kept import LEVELS, KeptTokens

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
