"""The table of the documentation, from the verdicts of ``try_every_type``."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "every-type.md"
UNTRIED = ("not built", "no such prompt")


def write(found: dict[str, dict[str, Any]], version: str) -> None:
    """Write the page.

    Args:
        found: verdicts by case.
        version: of the code; a verdict on another one is an error.

    Raises:
        ValueError: if a verdict is stale.
    """
    stale = [name for name, verdict in found.items() if verdict["version"] != version]
    if stale:
        raise ValueError(f"results of other code: {stale}: run without --stale.")
    PAGE.write_text(page(found))


def page(found: dict[str, dict[str, Any]]) -> str:
    """The page as Markdown."""
    import torch
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    tried = {name: u for name, u in found.items() if u["word"] != "no such prompt"}
    causal = {name: u for name, u in tried.items() if "/" not in name}
    several = {name: u for name, u in tried.items() if "/" in name}
    lines = [f"Measured with {versions} on a CPU by", "`python -m tests.families.try_every_type`.", ""]
    for title, part in (("Text", causal), ("Images, video and sound", several)):
        lines += [f"### {title}", "", _counts(part), "", *_rows(part), ""]
    return "\n".join(lines).rstrip() + "\n"


def _counts(part: dict[str, dict[str, Any]]) -> str:
    words = Counter(u["word"] for u in part.values())
    shown = [f"{words[word]} {word}" for word in ("passes", "refused", "fails", "not built") if words[word]]
    return f"{len(part)} cases: " + ", ".join(shown).replace("passes", "pass").replace("fails", "fail") + "."


def _rows(part: dict[str, dict[str, Any]]) -> list[str]:
    rows = ["| type | verdict | layers with a memory | why, or what the base model fails too |", "|---|---|---|---|"]
    for name, u in part.items():
        why = f"base: {', '.join(u['base'])}" if u["base"] else cause(u["cause"])
        rows.append(f"| `{name}` | {u['word']} | {u['layers']} | {why} |")
    return rows


def cause(text: str) -> str:
    """The reasons in an error, each once, fit for a cell of a table."""
    lines = text.strip().splitlines() or [""]
    if lines[0].endswith("candidates:"):
        lines = list(dict.fromkeys(re.sub(r"^\s*[\w.]+: ", "", line) for line in lines[1:]))
    shown = "; ".join(line.strip() for line in lines)
    shown = re.sub(r"^no suitable attention layer to retrofit; candidates: ", "", shown)
    interface = "does not use the attention interface"
    shown = re.sub(rf"^\w+ {interface} of transformers.*", interface, shown)
    shown = re.sub(r": expected full or sliding attention$|[.:] Choose them.*|: wrap its.*", "", shown)
    return re.sub(r"[|<>`]", "", shown)[:200]
