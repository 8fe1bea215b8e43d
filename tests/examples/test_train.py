"""The training script and its texts: what it writes, what it reads, and how sure its gap is."""

# ruff: noqa: F811 - fixtures are imported

import json
import sys
from pathlib import Path

import pytest
import torch

from ahn_layers.distillation.trainer import standard_error

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib")
import evaluate  # noqa: E402
import gap  # noqa: E402
import texts  # noqa: E402
import train  # noqa: E402

from .trying import folders, tokenizer  # noqa: E402, F401


def losses_with_a_gap(gap, noise, texts=2, tokens=512):
    """Losses by arm of texts in which full attention is better by ``gap``, and the memory closes half of it."""
    found = []
    for _ in range(texts):
        full = 3 + torch.randn(tokens, dtype=torch.float64)
        window = full + gap + noise * torch.randn(tokens, dtype=torch.float64)
        memory = window - gap / 2
        found.append({"full": full, "window": window, "memory": memory, "another_text": window - gap / 4})
    return found


@pytest.mark.parametrize("texts", [2, 8])
def test_a_share_is_of_a_gap_that_is_there(texts):
    found = gap.measure(losses_with_a_gap(0.1, 0.5, texts))
    assert found["verdict"] == "significant" and found["gap_closed"] == pytest.approx(0.5, abs=0.15)
    assert found["by_own_memory"] == pytest.approx(found["gap_closed"] / 2, abs=0.1)
    worse = gap.measure(losses_with_a_gap(-0.1, 0.5, texts))
    assert worse["verdict"] == "full attention is worse" and worse["gap_closed"] is None
    assert worse["by_own_memory"] is None


def test_the_trainer_says_how_sure_the_gap_is():
    sums = torch.tensor([[1.0, 2, 0, 1], [2, 5, 0, 2], [0, 0, 0, 0]])  # gaps of 1 and 1.5, and a text without tokens
    assert standard_error(sums) == pytest.approx(0.25)
    assert standard_error(sums[:1]) == float("inf")


def test_noise_has_no_share():
    """By chance one in twenty is taken for a gap."""
    found = [gap.measure(losses_with_a_gap(0.0, 0.5, texts)) for texts in (2, 8) for _ in range(50)]
    assert sum(cell["gap_closed"] is not None for cell in found) <= 8
    assert {cell["verdict"] for cell in found} >= {"not significant"}


def test_a_single_measurement_is_not_significant():
    (text,) = losses_with_a_gap(1.0, 0.1, texts=1, tokens=gap.SEGMENT + 9)
    found = gap.measure([{arm: values for arm, values in text.items() if arm != "another_text"}])
    assert found["verdict"] == "not significant" and found["another_text"] is None and found["gap_error"] is None
    json.loads(json.dumps(found), parse_constant=pytest.fail)


def test_a_start_that_contradicts_its_adapter_fails_before_the_training(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_trainer", lambda *_: pytest.fail("the training began"))
    words = ["--model", str(folders / "base"), "--text", str(folders / "text.txt"), "--output", str(tmp_path / "out")]
    words += ["--length", "80", "--start-from", str(folders / "adapter")]
    for wrong in (["--shared-state"], ["--memory-positions", "none"], ["--compressor", "Mamba2"]):
        with pytest.raises(SystemExit, match=f"Leave {wrong[0]} out"):
            train.main([*words, *wrong])
    with pytest.raises(SystemExit, match="--dev-length 33"):
        train.main([*words, "--dev", str(folders / "text.txt"), "--dev-length", "33"])


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_of_a_dataset(streaming, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"body": f"text {i}", "n": i} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    expected = [row["body"] for row in rows]
    for name in ("a.jsonl", "folder"):
        assert list(texts.read_dataset(str(tmp_path / name), None, "train", "body", streaming)) == expected
    assert texts.read_texts([tmp_path / "folder"], "body") == expected
    with pytest.raises(ValueError, match=r"--column n: .*\['body', 'n'\]"):
        texts.read_dataset(str(tmp_path / "a.jsonl"), None, "train", "n", streaming)


def test_a_stream_is_read_as_far_as_it_is_needed():
    read = []

    def stream():
        for i in range(1000):
            read.append(i)
            yield "some words"

    documents = texts.tokenize(tokenizer(), stream(), "test", enough=300)
    assert 300 <= sum(map(len, documents)) < 500 and len(read) < 60


def test_streaming_reads_what_the_steps_need(tmp_path, monkeypatch):
    asked, read = [], []

    def stream(*source):
        asked.append(source)
        for i in range(5000):
            read.append(i)
            yield "some words"

    monkeypatch.setattr(train, "read_dataset", stream)
    words = ["--dataset", "a", "--config", "b", "--split", "c", "--column", "d", "--output", str(tmp_path)]
    sizes = ["--steps", "3", "--batch", "2", "--accumulate", "2", "--length", "64"]
    options = train.parse([*words, *sizes, "--streaming"])
    documents, _ = train.load_data(tokenizer(), options)
    crops = train.crops_of(documents, tokenizer(), options)
    assert asked == [("a", "b", "c", "d", True)] and len(crops) == 12
    assert sum(map(len, crops.documents)) >= 12 * 64 and len(read) < 200
    train.load_data(tokenizer(), train.parse([*words, *sizes]))
    assert asked[-1][-1] is False and len(read) > 5000


def test_train_writes_an_adapter_that_evaluate_reads(folders, tmp_path):
    report = train.main([
        "--model", str(folders / "base"), "--text", str(folders / "text.txt"), "--dev", str(folders / "text.txt"),
        "--dev-length", "100", "--dev-count", "2", "--window", "24", "--sinks", "8", "--steps", "4",
        "--align-steps", "2", "--length", "80", "--batch", "2", "--save-every", "2", "--shared-state",
        "--gradient-checkpointing", "--output", str(tmp_path / "adapter"),
    ])  # fmt: skip
    assert report["steps"] == 4 and {"eval_full", "eval_window", "eval_memory"} <= report["metrics"].keys()
    metrics = report["metrics"]
    assert (metrics["eval_gap_closed"] is None) == (metrics["eval_gap"] != "significant")
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["tokens"] == 4 * 2 * 80
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(tmp_path / "adapter"), "--text", str(folders / "text.txt"),
        "--tokens", "0", "--stretches", "1", "--length", "100", "--start", "40", "--needles", "0", "--device", "cpu",
        "--dtype", "float32", "--output", str(tmp_path / "results"),
    ])  # fmt: skip
    assert set(results["gap"]) == {"24+8"}


def test_crops_depend_on_their_number_only():
    documents = [torch.arange(1000), torch.arange(5000, 5030), torch.arange(9000, 9300)]
    one, other = (texts.Crops(documents, 200, 50, copies=0.5, seed=3) for _ in range(2))
    assert torch.equal(one[7]["input_ids"], other[7]["input_ids"])
    assert all(len(one[i]["input_ids"]) == 200 for i in range(50))
    assert {int(crop["input_ids"][0]) // 5000 for crop in one} == {0, 1}
    with pytest.raises(ValueError, match="at least one stretch"):
        texts.Crops(documents, 5000, 1)
    pieces = texts.stretches(documents, 100, 4)
    assert [int(p["input_ids"][0]) for p in pieces] == [0, 400, 800, 9200]
