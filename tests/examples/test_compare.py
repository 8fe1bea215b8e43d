"""The comparison of compressors: every one is trained alike, and the numbers are those of its memory."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("matplotlib")

import compare_compressors  # noqa: E402

from .trying import base, tokenizer  # noqa: E402

OPTIONS = "--steps 2 --batch 2 --length 400 --window 24 --sinks 8 --stretches 4 --spans 2 --needles 1 --decode 8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base(8192).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def compare(model, folder, *arguments):
    return compare_compressors.main(["--model", str(model), *OPTIONS.split(), *arguments, "--output", str(folder)])


def test_all_see_the_same_and_leave_nothing_behind(model, tmp_path, capsys, unchecked):
    results = compare(model, tmp_path, "--compressors", "KDA", "AveragePooling", "Titans", "KDA")
    table = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["compressors"].keys() == results["compressors"].keys()
    assert (tmp_path / "results.png").stat().st_size > 1000 and (tmp_path / "results.txt").read_text() in table
    found, arms = results["compressors"], results["references"]
    assert found.keys() == {"KDA", "AveragePooling", "Titans"}, "the second KDA in the place of the first"
    starts = [u["divergence"][0] for u in found.values()]
    assert max(starts) - min(starts) < 1e-6, "untrained, on the same batch: the window alone"
    for u in found.values():
        assert u["gap"]["full"] == pytest.approx(arms["full"]["loss"], abs=1e-6)
        assert u["gap"]["another_text"] != u["gap"]["memory"] != u["gap"]["window"]
        assert u["memory_bytes"] == u["state_bytes"] + u["gate_bytes"]
    # float32, two layers: gates of 4 heads with each of 32 tokens; the states of 4 heads of 8, or 2 pools
    assert found["KDA"]["gate_bytes"] == 4 * 2 * 32 * 4 * (4 + 1) and found["AveragePooling"]["gate_bytes"] == 0
    assert found["Titans"]["state_bytes"] == 2 * found["KDA"]["state_bytes"] == 2 * 4 * 2 * 4 * 8 * 8


def test_a_compressor_of_another_module(model, tmp_path, monkeypatch, unchecked):
    (tmp_path / "slowly_fading.py").write_text(
        "from ahn_layers import Compressor, outer\n"
        "class SlowlyFading(Compressor):\n"
        "    def fold(self, state, k, v):\n"
        "        return 0.99 * state + outer(k, v)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--module", "slowly_fading", "--compressors", "SlowlyFading", "--needles", "0", "--decode", "0"]
    found = compare(model, tmp_path / "results", *arguments)["compressors"]["SlowlyFading"]
    assert found["decode_ms"] is None and "needles" not in found
    del sys.modules["slowly_fading"]


def test_one_that_fails_does_not_cost_the_others(model, tmp_path, monkeypatch, unchecked):
    def fold_nothing(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(compare_compressors.Compressor.by_name["GLA"], "scan", fold_nothing)
    with pytest.raises(SystemExit, match=r"failed, see results\.json: GLA"):
        compare(model, tmp_path, "--compressors", "GLA", "RetNet", "--needles", "0", "--decode", "0")
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["compressors"]) == ["RetNet"] and results["failed"] == {"GLA": "RuntimeError: no kernel"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compressors", "Nothing"], "no compressor Nothing"),
        (["--length", "100"], "expected at least 296"),
        (["--text", "a.txt"], "give both of --text and --dev"),
        (["--decode", "3"], "expected at least 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare(model, tmp_path, *arguments)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
