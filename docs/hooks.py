"""What the site does beside Markdown.

Equations become MathML when it is built (no script, no font is fetched to read it), papers become links, and the search
leaves out the listings of whole scripts.
"""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_PAPER = re.compile(r"(?<!>)arXiv (\d{4}\.\d{5})")


def on_page_content(html: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex has marked and the arXiv numbers that are no links yet; mark the listings."""
    html = html.replace('<details class="example">', '<details class="example" data-search-exclude>')
    return _PAPER.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', _MATHS.sub(_to_mathml, html))


def _to_mathml(match: re.Match[str]) -> str:
    text = unescape(match[2]).replace(r"\mathrm{", r"\operatorname{")  # which GitHub does not allow
    if match[1] == "span":
        return f'<span class="maths">{convert(text, display="inline")}</span>'
    parts = [convert(part, display="block") for part in text.split(r"\qquad")]  # a line may end between them
    return f'<div class="maths" data-search-exclude>{" ".join(parts)}</div>'
