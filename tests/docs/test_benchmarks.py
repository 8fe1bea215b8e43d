"""The benchmarks page: its numbers and its figure are those of the pages that say how they were measured."""

import re
import runpy

import pytest

from .test_docs import EXCERPTS, ROOT

DOCS = ROOT / "docs"
DETAILS = (DOCS / "benchmarks-details.md").read_text()
ROWS = [line for line in (DOCS / "benchmarks.md").read_text().splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("matplotlib")
    return runpy.run_path(str(DOCS / "figures.py"))


def cells(row):
    return [u.strip().replace("*", "") for u in row.strip("|").split("|")][1:4]


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row[2:40])
def test_a_number_of_the_short_table_stands_in_the_details(row):
    """The first row is in the table of the recall guide, see below."""
    for number in re.findall(r"\d[\d.,]*", " ".join(cells(row))):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|\.\d)", DETAILS), number


def test_the_answers_are_those_of_the_guide(figures):
    table = figures["recall_table"]((DOCS / "guides" / "recall.md").read_text())
    assert cells(ROWS[0]) == [str(sum(right for right, _ in cell.answers)) for cell in table[:3]]
    assert {asked for cell in table[:3] for _, asked in cell.answers} == {120} and "of 360" in ROWS[0]


def test_the_figure_has_the_times_of_the_table(figures):
    prompts = figures["prompt_table"](DETAILS)
    short = " ".join(ROWS)
    assert {arm for arm, _, _ in prompts} == {"full attention", "memory"} and len(prompts) >= 3
    for _, tokens, seconds in prompts:
        assert f"{tokens:,}" in short and re.search(rf"\b{seconds:g}0? s\b", short), "the short table lacks this row"


@pytest.mark.parametrize("page", ["README.md", "docs/guides/paper.md"])
def test_other_pages_have_the_times_of_the_table(figures, page):
    """Rounded; those of a million tokens are in the README alone."""
    text = (ROOT / page).read_text()
    for _, tokens, seconds in figures["prompt_table"](DETAILS):
        if tokens == 131_072 or page == "README.md":
            assert re.search(rf"(?<![\d.])({seconds:.2f}|{seconds:.1f}|{seconds:.0f}) s\b", text), (tokens, seconds)


def test_the_figure_has_the_bytes_of_the_readme(figures):
    """Those are compared with ``memory_report`` in test_readme.py."""
    (row,) = re.findall(r"^\| Qwen2\.5-3B .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    said = [float(u) for u in re.findall(r"([\d.]+) GB", row)]
    held = [figures["larger_bytes"](kept, 131_072) / 1e9 for kept in (None, 32_768, 8_192)]
    assert held == [pytest.approx(u, rel=0.02) for u in said]
    assert figures["larger_bytes"](8_192, 2**20) == figures["larger_bytes"](8_192, 2**15)


def test_a_narrow_screen_has_a_figure_of_its_own():
    shown = EXCERPTS["for_site"]((DOCS / "benchmarks.md").read_text(), "benchmarks.md")
    assert "benchmarks-tall.png){ .on-phone }" in shown


def test_the_cost_of_training_follows_from_the_measured_speeds():
    text = (DOCS / "guides" / "training.md").read_text().split("## What it costs", 1)[1]
    rows = re.findall(r"^\| [\w.-]+ \| ([\d,]+)(, computed)? \| ([\d.]+) min \| ([\d.]+) h \|", text, re.MULTILINE)
    assert len(rows) == 3 and [bool(computed) for _, computed, *_ in rows] == [False, False, True]
    for speed, computed, minutes, hours in rows:
        assert computed or f"{speed} tokens/s" in DETAILS
        per_second = int(speed.replace(",", ""))
        assert float(minutes) == pytest.approx(13.6e6 / per_second / 60, rel=0.05)
        assert float(hours) == pytest.approx(1e9 / per_second / 3600, rel=0.03)
    larger, smaller = (int(rows[i][0].replace(",", "")) for i in (1, 2))
    assert smaller == pytest.approx(larger * 3.09 / 7.07, rel=0.01)
