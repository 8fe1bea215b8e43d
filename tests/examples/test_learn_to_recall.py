"""The example that teaches a memory to recall."""

# ruff: noqa: F811 - fixtures are imported

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ahn_layers import DeltaNet, SalientSlots, adapter_parameters, retrofit, save_adapter
from ahn_layers.distillation import distillation_loss, salient_slots

from .trying import noting, workplace  # noqa: F401

ASKED = ["--model", "model", "--text", "text.txt", "--window", "30", "--sinks", "2", "--slots", "20"]
ASKED += ["--questions", "1", "--test-length", "900"]


@pytest.fixture
def lesson(workplace):
    """The example, a small model in a folder, and a text."""
    taught = ["--length", "700", "--score-steps", "2", "--retrieval-steps", "1", "--steps", "2"]
    return importlib.import_module("learn_to_recall").main, [*ASKED, *taught]


def test_the_lesson(lesson, capsys):
    main, small = lesson
    results = main([*small, "--output", "out"])
    assert len(results["score_errors"]) == len(results["losses"]) == 2
    assert list(results["recall"]) == ["full attention", "window", "slots"]
    assert "slots, 52 tokens" in capsys.readouterr().out and Path("out/recall.png").exists()
    asked = main([*ASKED, "--ask", "out", "--output", "asked"])
    assert asked["recall"] == results["recall"] and not asked["losses"]
    assert not Path("asked/adapter.json").exists()


@pytest.mark.parametrize("options, truth", [((), 0.5), (("--truth", "0.25"), 0.25)])
def test_answers_are_learned_from_the_truth_as_well(lesson, monkeypatch, options, truth):
    main, small = lesson
    module, weights = importlib.import_module("learn_to_recall"), []
    monkeypatch.setattr(module, "distillation_loss", noting(weights, module.distillation_loss))
    main([*small, *options, "--output", "out"])
    assert weights == [(1 - truth, truth, True)] * 2


def test_layers_that_look_up_get_more_slots_before_answers_are_learned(lesson, monkeypatch):
    main, small = lesson
    module, slots = importlib.import_module("learn_to_recall"), []

    def loss(model, *args, **kwargs):
        slots.append([policy.num_slots for policy in salient_slots(model)])
        return distillation_loss(model, *args, **kwargs)

    monkeypatch.setattr(module, "distillation_loss", loss)
    results = main([*small, "--slots-by-layer", "--output", "out"])
    assert slots == [results["slots"]] * 2
    assert sorted(results["slots"]) in ([0, 40], [20, 20])  # one layer does half of it, or both are needed
    described = json.loads(Path("out/adapter.json").read_text())["evictions"]
    assert {one["options"]["num_slots"] for one in described} == set(results["slots"])
    rates = [u for name, u in load_file("out/adapter.safetensors").items() if name.endswith("log_rate")]
    assert all(bool(((u.exp() > 1e-3) | u.exp().isclose(torch.tensor(1e-5))).all()) for u in rates)  # settled


def test_longer_texts_get_more_facts_as_far_apart(lesson):
    facts_for = importlib.import_module("recall_options").facts_for
    assert [facts_for(length) for length in (1536, 2048, 4096, 8192)] == [(6, 14), (6, 14), (2, 6), (4, 12)]


def test_the_lesson_goes_on_from_trained_parts(lesson):
    main, small = lesson
    assert main([*small, "--compressor", "GatedDeltaNet", "--output", "slots"])["losses"]
    assert '"GatedDeltaNet"' in Path("slots/adapter.json").read_text()
    model = retrofit(AutoModelForCausalLM.from_pretrained("model"), DeltaNet, window_size=30, memory_positions="none")
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.normal_()
    save_adapter(model, "compressor")
    none = ["--score-steps", "0", "--retrieval-steps", "0", "--steps", "0"]
    parts = ["--scores-from", "slots", "--start-from", "compressor"]
    main([*small, *none, *parts, "--output", "both"])
    assert {'"DeltaNet"', '"none"'} <= set(Path("both/adapter.json").read_text().replace(",", " ").split())
    scores, compressor, both = (load_file(f"{u}/adapter.safetensors") for u in ("slots", "compressor", "both"))
    chosen = {name: u for name, u in scores.items() if ".eviction." in name} | compressor
    assert chosen.keys() == both.keys() and all(torch.equal(u, both[name]) for name, u in chosen.items())
    assert main([*small, *none, "--steps", "1", "--ce", "0.5", *parts, "--output", "more"])["losses"]
    assert not torch.equal(
        load_file("more/adapter.safetensors")[next(iter(compressor))], next(iter(compressor.values()))
    )
    for wrong, message in (
        (["--start-from", "slots"], "--start-from slots: this memory has slots already"),
        (["--scores-from", "compressor"], "--scores-from compressor: this memory has no slots"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*small, *wrong])


@pytest.mark.parametrize("given, slots", [([], [4, 36]), (["--slots", "10"], [2, 18]), (["--slots", "40"], [8, 72])])
def test_scores_keep_their_slots_by_layer(lesson, given, slots):
    main, small = lesson
    model = retrofit(AutoModelForCausalLM.from_pretrained("model"), None, window_size=30, eviction=SalientSlots(20))
    for policy, number in zip(salient_slots(model), (4, 36), strict=True):
        policy.num_slots = number
    save_adapter(model, "scores")
    none = ["--score-steps", "0", "--retrieval-steps", "0", "--steps", "0", "--scores-from", "scores", *given]
    at = small.index("--slots")
    main([*small[:at], *small[at + 2 :], *none, "--output", "again"])
    described = json.loads(Path("again/adapter.json").read_text())["evictions"]
    assert [one["options"]["num_slots"] for one in described] == slots


def test_the_lesson_refuses(lesson, capsys):
    main, small = lesson
    for wrong, message in (
        (["--test-length", "200"], "--test-length 200: expected more than the 52 tokens kept"),
        (["--length", "300"], "--length 300: expected at least 528"),
        (["--coverage", "0"], "--coverage 0: expected a share above 0"),
        (["--ce", "-1"], "expected a number from 0 to 1000"),
        (["--start-from", "a", "--compressor", "GLA"], "--compressor: the adapter of --start-from has its own"),
        (["--ask", "a", "--scores-from", "b"], "--scores-from: the adapter of --ask has its own"),
        (["--ask", "a", "--truth", "0.3"], "--truth, --length, --score-steps, --retrieval-steps, --steps: with --ask"),
        (["--steps", "0", "--truth", "0.3"], "--truth: with --steps 0 this changes nothing. Leave it out"),
        (["--truth", "2"], "expected a number from 0 to 1"),
        (["--retrieval-steps", "0", "--coverage", "0.5"], "--coverage: with --retrieval-steps 0 this changes nothing"),
        (["--retrieval-steps", "0", "--slots-by-layer"], "--slots-by-layer: with --retrieval-steps 0 this changes"),
        (["--ask", "a", "--slots-by-layer"], "--slots-by-layer: with --ask"),
    ):
        with pytest.raises(SystemExit):
            main([*small, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="learn_to_recall: --ask nowhere"):
        main([*ASKED, "--ask", "nowhere"])


def test_questions_are_about_what_a_memory_has_lost(lesson):
    """Sizes are those of the adapter, and texts that are too short for it, or for a question, are refused."""
    main = lesson[0]
    model = retrofit(
        AutoModelForCausalLM.from_pretrained("model"), None, window_size=700, eviction=SalientSlots(20, score_size=4)
    )
    save_adapter(model, "large")
    for given, message in (
        (ASKED, "--window 30: the memory of --ask large has 700"),
        ([*ASKED[:4], "--test-length", "900"], "--test-length 900: expected more than the 720 tokens kept"),
        ([*ASKED[:4], "--test-length", "99000"], "--test-length 99000: the longest text has"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*given, "--ask", "large", "--output", "out"])
