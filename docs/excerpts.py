"""What pages take from other files of the repository, so that they can be read on the site and on GitHub.

    python docs/excerpts.py    # copy the parts of the examples into the pages again

A part of an example, from ``# --8<-- [start:name]`` to ``[end:name]``, stands in the page itself: in the block below a
comment that names it, ``<!-- examples/nanogpt.py: model -->``. A test compares the two.

A whole file is a link on a line of its own, whose text is the path of the file. GitHub shows the link; on the site the
file takes its place, a script as a listing that can be opened. A figure in SVG becomes part of its page there, and a
figure with a second form for narrow screens (``recall.png`` and ``recall-tall.png``) is shown in both.
"""

import argparse
import re
from pathlib import Path, PurePosixPath
from textwrap import dedent
from typing import Any

DOCS = Path(__file__).parent
PART = re.compile(r"^(<!-- (examples/[\w/]+\.py): (\w+) -->\n```python\n).*?^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^(?:- )?\[`?([\w./-]+\.(?:py|md))`?\]\(([^)\s]+)\)(?:: (.+))?$", re.MULTILINE)
FIGURE = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+)\.(svg|png)\)$", re.MULTILINE)
SCRIPT = """
??? example "{title}"

    ``` {{ .python }}
    --8<-- "{path}"
    ```
"""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """What MkDocs shows of a page."""
    return for_site(markdown, page.file.src_uri)


def for_site(text: str, page: str) -> str:
    """The Markdown of the site, with the whole files that a page links to on lines of their own.

    Args:
        text: of the page.
        page: its path below ``docs``.
    """
    folder = PurePosixPath("docs", page).parent

    def file(match: re.Match[str]) -> str:
        path, target, remark = match.groups()
        if path != _from_root(folder, target):
            return match[0]  # a link among others
        if path.endswith(".md"):
            return f'--8<-- "{path}"'
        return SCRIPT.format(title=f"{path}: {remark}" if remark else path, path=path)

    def figure(match: re.Match[str]) -> str:
        name, kind = match[2], match[3]
        path = _from_root(folder, name)
        if kind == "svg":
            return f'<div class="figure">\n--8<-- "{path}.svg"\n</div>'
        if (DOCS.parent / f"{path}-tall.png").exists():
            return f"![{match[1]}]({name}.png){{ .on-wide }}\n![{match[1]}]({name}-tall.png){{ .on-phone }}"
        return match[0]

    return FIGURE.sub(figure, FILE.sub(file, text))


def _from_root(folder: PurePosixPath, target: str) -> str:
    """The path from the root of the repository for a link of a page in a folder."""
    parts: list[str] = []
    for part in (folder / target).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def with_parts(text: str) -> str:
    """The text of a page with the parts of examples as they are in their files now."""
    return PART.sub(lambda match: f"{match[1]}{part(match[2], match[3])}```", text)


def part(path: str, name: str) -> str:
    """The lines of a script between the two marks of a part.

    Args:
        path: from the root of the repository.
        name: of the part.
    """
    text = (DOCS.parent / path).read_text()
    start, end = (rf"^ *# --8<-- \[{mark}:{name}\]$" for mark in ("start", "end"))
    found = re.search(rf"{start}\n(.*?){end}", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{path} has no part {name!r}: expected lines '# --8<-- [start:{name}]' and '[end:{name}]'.")
    return dedent(found[1]).strip("\n") + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description="Copy the parts of the examples into the pages again.").parse_args()
    for one in sorted(DOCS.rglob("*.md")):
        before = one.read_text()
        if (after := with_parts(before)) != before:
            one.write_text(after)
            print(f"{one.relative_to(DOCS)}: parts of examples copied")
