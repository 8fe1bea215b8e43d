"""The notebooks run from their first cell to their last, with small settings, and hold the outputs of a real run."""

import json
import sys

import pytest

from ..notebooks import NOTEBOOKS, ROOT, run
from ..small_models import install

SMALL = {
    "quickstart": {"TOKENS": 200, "WINDOW": 60, "SINKS": 4, "CHUNK": 100},
    "train": {"STEPS": 2, "LENGTH": 150, "TEXTS": 2},
    "compressor": {"TOKENS": 120},
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, unchecked):
    monkeypatch.syspath_prepend(ROOT / "examples")
    install(monkeypatch, tmp_path, fits_shipped_adapters=path.stem == "quickstart")
    monkeypatch.setattr(sys, "path", list(sys.path))
    _, names = run(path, SMALL[path.stem])
    assert all(names[name] == value for name, value in SMALL[path.stem].items())
    if path.stem == "quickstart":
        assert names["losses"]["memory"].shape == (200,) and names["cache"].get_seq_length() > 200
    elif path.stem == "train":
        assert names["before"]["memory"] == names["before"]["window"] and len(names["losses"]) == 2
    else:
        assert len(set(names["sizes"][1:])) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_outputs(path):
    """Of every cell that prints, and numbered as Jupyter numbers them."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"] or not any(line.lstrip().startswith(("print(", "plt.show")) for line in cell["source"])
    assert path.stat().st_size < 200_000
