"""What pages take from other files: GitHub shows the code too, and it is that of the files."""

import re

import pytest

from .test_docs import EXCERPTS, PAGES, ROOT, page_name

PARTS = re.compile(r"^<!-- (examples/[\w/]+\.py): (\w+) -->$", re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if PARTS.search(page.read_text())], ids=page_name)
def test_parts_of_examples_are_those_of_the_files(page):
    text = page.read_text()
    assert EXCERPTS["with_parts"](text) == text, "run python docs/excerpts.py"
    assert len(PARTS.findall(text)) == len(EXCERPTS["PART"].findall(text)), "a comment without a block ```python below"


def test_every_marked_part_is_on_a_page():
    shown = {found for page in PAGES for found in PARTS.findall(page.read_text())}
    marked = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "examples").rglob("*.py")
        for name in re.findall(r"^ *# --8<-- \[start:(\w+)\]$", path.read_text(), re.MULTILINE)
    }
    assert shown == marked and len(shown) > 5


def test_a_part_that_has_changed_is_copied():
    page = "<!-- examples/new_compressor.py: compressor -->\n```python\nstale = 1\n```\n\n```python\nkept\n```\n"
    fresh = EXCERPTS["with_parts"](page)
    assert "stale" not in fresh and "class MovingAverage(Compressor):" in fresh and fresh.endswith("kept\n```\n")
    with pytest.raises(ValueError, match="no part 'nothing'"):
        EXCERPTS["with_parts"](page.replace(": compressor", ": nothing"))


@pytest.mark.parametrize("page", [page for page in PAGES if "\n::: " not in page.read_text()], ids=page_name)
def test_github_shows_what_the_site_shows(page):
    """No syntax of the site alone: files taken in, boxes, attributes, equations between backslashes."""
    prose = re.sub(r"^( *)```.*?^\1```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for only_here in (r"^[ \S]*-8<-", r"^(?:!!!|\?\?\?|===) ", r"\{ ?[.:#]", r"\\\(|\\\[|\\operatorname"):
        assert not re.search(only_here, prose, re.MULTILINE), f"GitHub shows this as it stands: {only_here}"


@pytest.mark.parametrize(
    "line, on_the_site",
    [
        ("- [`examples/train.py`](../../examples/train.py): the loop", '??? example "examples/train.py: the loop"'),
        ("[CHANGELOG.md](../../CHANGELOG.md)", '--8<-- "CHANGELOG.md"'),
        ("![A life](../assets/token-life.svg)", '--8<-- "docs/assets/token-life.svg"'),
        ("![Answers](../assets/recall.png)", "![Answers](../assets/recall-tall.png){ .on-phone }"),
    ],
)
def test_a_file_on_a_line_of_its_own_is_taken_in(line, on_the_site):
    assert on_the_site in EXCERPTS["for_site"](f"{line}\n", "guides/a.md")


@pytest.mark.parametrize(
    "line", ["See [`examples/train.py`](../../examples/train.py).", "- [training.md](training.md)", "![L](../a.png)"]
)
def test_other_links_stay(line):
    assert EXCERPTS["for_site"](f"{line}\n", "guides/a.md") == f"{line}\n"
