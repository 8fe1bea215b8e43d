"""The evaluation: needles lie where they are said to, arms differ where they must, lm_eval runs unchanged."""

# ruff: noqa: F811 - fixtures are imported

import json
import sys
from pathlib import Path

import pytest
import torch

from ahn_layers import SalientSlots, adapter_parameters

from ..models import retrofitted

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib")
import arms  # noqa: E402
import evaluate  # noqa: E402
import needles  # noqa: E402
import train  # noqa: E402

from .trying import folders, small, tokenizer  # noqa: E402, F401


def test_evaluate_writes_table_json_and_picture(folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--text", str(folders / "text.txt"),
        "--tokens", "300", "--chunk", "50", "--stretches", "3", "--length", "200", "--start", "40", "--needles", "1",
        "--needle-length", "420", "--capacities", "24+8", "56+8", "--sink-positions", "trained", "absolute",
        "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path),
    ])  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()).keys() == results.keys()
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert "bytes" not in results and "spans" not in results
    assert set(results["gap"]) == {"24+8", "56+8"} and set(results["needles"]) == set(needles.BENCHMARKS)
    for cell in results["gap"].values():
        assert cell["another_text"] != cell["memory"] and len(cell["by_text"]["another_text"]) == len(
            cell["by_text"]["memory"]
        )
        closed = (cell["window"] - cell["memory"]) / (cell["window"] - cell["full"])
        assert cell["gap_closed"] == (pytest.approx(closed) if cell["verdict"] == "significant" else None)
    assert len(results["tables"]) == 4 and "evicted" in results["tables"][2]
    streamed = results["streaming"]
    assert streamed["memory"]["cache_bytes"][-1] == streamed["memory"]["cache_bytes"][-2]  # constant once it is full
    assert streamed["full attention"]["cache_bytes"][-1] > streamed["full attention"]["cache_bytes"][-2]


@pytest.mark.parametrize("adapter, names", [
    ("slots", ["full", "window", "compressor", "slots", "memory"]), ("slots alone", ["full", "window", "memory"]),
])  # fmt: skip
def test_evaluate_compares_slots_at_equal_capacity(adapter, names, folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / adapter), "--text", str(folders / "text.txt"),
        "--tokens", "200", "--chunk", "50", "--stretches", "2", "--length", "330", "--start", "40", "--needles", "4",
        "--needle-length", "420", "--tasks", "pass key", "RULER common words", "--spans", "2", "--sink-positions",
        "absolute", "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path),
    ])  # fmt: skip
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(results["spans"]) == list(results["bytes"]["24+8"]) == names
    assert [cell["tokens"] for cell in results["bytes"]["24+8"].values()] == [420, *[48] * (len(names) - 1)]
    assert list(results["streaming"]) == ["full attention", "window only", *names[2:]]
    for name, arm in zip(results["streaming"], names, strict=True):
        if arm != "full":
            assert results["streaming"][name]["cache_bytes"][-1] == results["bytes"]["24+8"][arm]["bytes"]
    assert set(results["gap"]["24+8"]["by_text"]) == {*names, "another_text"}
    assert list(results["sinks"]) == [f"absolute {arm}" for arm in names[1:]]
    assert set(results["needles"]) == {"pass key", "RULER common words"}
    assert list(results["needles"]["RULER common words"]) == ["the whole text"]
    for cells in results["needles"].values():
        assert sum(cell["n"] for cell in cells.values()) == 4
        for cell in cells.values():
            assert list(cell["interval"]) == names
            assert all(low <= cell[arm] <= high for arm, (low, high) in cell["interval"].items())
    assert len(results["tables"]) == 6 and "24+8+16 slots" in results["tables"][0]
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_needles_that_are_all_evicted_have_a_row_of_their_own(folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / "slots"), "--text", str(folders / "text.txt"),
        "--tokens", "0", "--stretches", "0", "--needles", "5", "--batch", "3", "--evicted", "--needle-length", "420",
        "--slots", "8", "--tasks", "pass key", "RULER frequent words", "--device", "cpu", "--dtype", "float32",
        "--scores", "key_norm", "key_difference", "--output", str(tmp_path),
    ])  # fmt: skip
    arms = ["full", "window", "compressor", "slots", "memory", "key_norm", "key_difference"]
    assert list(results["needles"]["RULER frequent words"]["the whole text"]["interval"]) == arms
    by_arm = results["bytes"]["24+8"]
    assert by_arm["key_norm"]["bytes"] < by_arm["slots"]["bytes"] < by_arm["memory"]["bytes"]
    assert results["bytes"]["24+8"]["memory"]["tokens"] == 24 + 8 + 8
    results = results["needles"]
    assert list(results["RULER frequent words"]) == ["the whole text"]
    places = results["pass key"]
    assert list(places)[-1] == "evicted, at any distance" and all(name.startswith("evicted") for name in places)
    assert places["evicted, at any distance"]["n"] == 5 == sum(u["n"] for u in places.values()) - 5


def test_one_rate_for_all_heads():
    model = retrofitted(dtype=torch.float32, eviction=SalientSlots(4))
    arms.set_rate(model, 0.25)
    rates = [parameter.exp() for name, parameter in adapter_parameters(model) if "log_rate" in name]
    assert rates and all(torch.allclose(rate, torch.tensor(0.25)) for rate in rates)
    with pytest.raises(ValueError, match="--rate 0: expected a number above 0"):
        arms.set_rate(model, 0)


def test_the_table_says_that_a_gap_is_not_significant(folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--text", str(folders / "text.txt"),
        "--tokens", "0", "--stretches", "1", "--length", "100", "--start", "40", "--needles", "0", "--device", "cpu",
        "--dtype", "float32", "--output", str(tmp_path),
    ])  # fmt: skip
    assert "not significant" in results["tables"][0] and "%" not in results["tables"][0].splitlines()[-1]


@pytest.mark.parametrize("given, message", [
    (["--length", "90000"], "--length 90000: the longest text has"),
    (["--length", "100", "--start", "99"], "--length 100: nothing is measured before position 99"),
    (["--length", "40", "--start", "1", "--capacities", "56+8"], "--length 40: nothing is measured before position 64"),
    (["--spans", "2", "--length", "250", "--start", "99"], "needs 296 tokens"),
    (["--capacities", "24-8"], "expected WINDOW+SINKS"),
    (["--compressor", "Mamba2"], "Leave --compressor out"),
    (["--text", "nowhere.txt"], "nowhere.txt"),
    (["--output", __file__], "File exists"),
    (["--tasks", "RULER"], "invalid choice"),
    (["--slots", "9"], "--slots 9: this memory has no slots"),
    (["--rate", "0.1"], "--rate 0.1: this memory has no learned slots"),
    (["--scores", "recent"], "--scores: this memory has no slots"),
    (["--stretches", "0", "--evicted", "--needle-length", "150"], "--needle-length 150: expected at least 160"),
])  # fmt: skip
def test_a_wrong_option_fails_before_anything_is_measured(given, message, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "streaming", lambda *_: pytest.fail("the first part ran"))
    words = ["--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*words, "--text", str(folders / "text.txt"), "--device", "cpu", "--dtype", "float32", *given])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


WRONG = {
    "a text that is not there": (["--text", "nowhere.txt"], "nowhere.txt"),
    "no source": ([], "one of --text and --dataset"),
    "two sources": (["--text", "TEXT", "--dataset", "a"], "one of --text and --dataset"),
    "a configuration of nothing": (["--text", "TEXT", "--config", "a"], "are for --dataset"),
    "a stream of nothing": (["--text", "TEXT", "--streaming"], "are for --dataset"),
    "no such dataset": (["--dataset", "nobody/nothing"], "--dataset nobody/nothing"),
    "no such column": (["--dataset", "JSONL", "--column", "title"], "--column title: no column of text"),
    "no such field": (["--text", "JSONL", "--column", "title"], "the field 'title'"),
    "no such split": (["--dataset", "JSONL", "--split", "nothing"], "nothing"),
    "no such configuration": (["--dataset", "CSV", "--config", "b", "--split", "c"], "--dataset"),
    "a broken line": (["--text", "BROKEN"], "line 2: expected a JSON object"),
    "a dev text that is not there": (["--text", "TEXT", "--dev", "nowhere"], "nowhere"),
    "short texts to measure on": (
        ["--text", "TEXT", "--length", "80", "--dev", "TEXT", "--dev-length", "9000"],
        "9000 tokens in one",
    ),
    "nothing beyond the window": (["--text", "TEXT", "--dev", "TEXT", "--dev-length", "500"], "--dev-length 500"),
    "texts shorter than a sequence": (["--text", "TEXT", "--length", "90000"], "at least one stretch of 90000"),
    "no checkpoint": (["--text", "TEXT", "--resume"], "--resume: no checkpoint"),
    "no adapter": (["--text", "TEXT", "--start-from", "nowhere"], "nowhere: no such file or folder"),
    "nothing to measure on the way": (["--text", "TEXT", "--eval-every", "5"], "--eval-every"),
    "a share": (["--text", "TEXT", "--copies", "2"], "from 0 to 1"),
    "a window": (["--text", "TEXT", "--window", "0"], "at least 1"),
    "sinks": (["--text", "TEXT", "--draw-sinks", "-4"], "draw-sinks"),
    "a dtype": (["--text", "TEXT", "--dtype", "float7"], "invalid choice"),
    "a compressor": (["--text", "TEXT", "--compressor", "Nothing"], "invalid choice"),
    "an output that is a file": (["--text", "TEXT", "--output", "TEXT"], "a file, expected a folder"),
}


@pytest.mark.parametrize("given, message", WRONG.values(), ids=WRONG)
def test_a_wrong_option_fails_before_the_model_is_loaded(given, message, folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "a.csv").write_text("text\nwords\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "some words"}\nno JSON\n')
    monkeypatch.setattr(train, "load_causal_lm", lambda *_: pytest.fail("the model was loaded"))
    paths = {
        "TEXT": folders / "text.txt", "JSONL": tmp_path / "a.jsonl", "CSV": tmp_path / "a.csv",
        "BROKEN": tmp_path / "broken.jsonl",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [str(paths.get(word, word)) for word in given]
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", str(folders / "base"), "--output", str(tmp_path / "out"), *words])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_lm_eval_runs_on_a_retrofitted_model(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = " alpha beta gamma delta"  # lm_eval moves a space at the end of the context into the answer
    rows = [{"context": words * (4 + i), "choices": [" one", " two"], "label": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "data.jsonl"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    model, letters = small(), tokenizer()

    def run():
        harness = HFLM(pretrained=model, tokenizer=letters, batch_size=2, max_length=512)
        out = lm_eval.simple_evaluate(
            harness,
            tasks=["local_choice"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        samples = sorted(out["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
        return [float(response[0]) for sample in samples for response in sample["filtered_resps"]]

    def by_hand():
        values = []
        for row in rows:
            for choice in row["choices"]:
                context, whole = letters.encode(row["context"]), letters.encode(row["context"] + choice)
                with torch.no_grad():
                    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                values.append(sum(float(scores[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        return values

    found = {}
    for arm in arms.arms_of(model):
        with arms.use_arm(model, arm):
            found[arm] = run()
            assert found[arm] == pytest.approx(by_hand(), abs=1e-3)
    assert found["memory"] != pytest.approx(found["window"], abs=1e-3)
    assert found["full"] != pytest.approx(found["window"], abs=1e-3)
