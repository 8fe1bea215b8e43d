"""train.py with slots: the stages, what is taught, an interrupted stage that goes on."""

# ruff: noqa: F811 - fixtures are imported

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ahn_layers import SalientSlots, adapter_parameters, retrofit
from ahn_layers.distillation import set_slots

from ..models import base
from .trying import noting, workplace  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(workplace):
    """The script with a small model in a folder, and a text; returns its report and the weights it wrote."""
    small = ["--model", "model", "--text", "text.txt", "--window", "30", "--sinks", "2", "--length", "620", "--batch"]
    small += ["2", "--steps", "2", "--save-every", "1"]
    main = importlib.import_module("train").main

    def start(*options, output="out"):
        report = main([*small, *options, "--output", output])
        return report, load_file(f"{output}/adapter.safetensors")

    return start


STAGES = ("--slots", "20", "--score-steps", "4", "--retrieval-steps", "1")


def kinds(weights):
    """Weights of scores, rates and compressor."""
    rates = {name: u for name, u in weights.items() if name.endswith("log_rate")}
    scores = {name: u for name, u in weights.items() if ".eviction." in name and name not in rates}
    return scores, rates, {name: u for name, u in weights.items() if ".eviction." not in name}


def test_stages_and_steps_write_an_adapter_with_slots(run):
    judged = ("--dev", "text.txt", "--dev-length", "200", "--dev-count", "2")
    report, weights = run(*STAGES, "--coverage", "0.3", *judged)
    described = json.loads(Path("out/adapter.json").read_text())
    assert described["evictions"][0]["options"]["num_slots"] == 20 and described["window_size"] == 30
    scores, rates, _ = kinds(weights)
    assert all(u.isfinite().all() for u in weights.values()) and all(u.any() for n, u in scores.items() if "down" in n)
    assert len({round(float(u), 2) for rate in rates.values() for u in rate}) > 1  # heads that keep, and others
    assert report["metrics"]["eval_memory"] > 0


@pytest.mark.parametrize("options, truth", [((), 0.5), (("--truth", "0.25"), 0.25)])
def test_answers_are_learned_from_the_truth_as_well(run, monkeypatch, options, truth):
    trainer, weights = importlib.import_module("ahn_layers.distillation.trainer"), []
    monkeypatch.setattr(trainer, "distillation_loss", noting(weights, trainer.distillation_loss))
    run("--slots", "20", *options)
    assert weights == [(1 - truth, truth, True)] * 2


def test_layers_that_look_up_get_more_slots(run, capsys):
    with pytest.raises(SystemExit):
        run("--slots", "20", "--slots-by-layer")
    assert "--slots-by-layer: which layers look up has to be measured" in capsys.readouterr().err
    run(*STAGES, "--slots-by-layer")
    said = json.loads(capsys.readouterr().out.partition("slots: ")[2].splitlines()[0])
    described = json.loads(Path("out/adapter.json").read_text())["evictions"]
    by_layer = {layer: one["options"]["num_slots"] for one in described for layer in one["layers"]}
    assert [by_layer[layer] for layer in sorted(by_layer)] == said and sum(said) == 40


@pytest.mark.parametrize("teach", ["scores", "compressor"])
def test_scores_and_compressor_apart(run, teach):
    _, weights = run(*STAGES, "--teach", teach)
    scores, _, others = kinds(weights)
    assert any(u.any() for n, u in others.items() if n.endswith("o_proj.weight")) == (teach == "compressor")
    before = [u.bfloat16() for u in torch.load("out/checkpoints/stage.pt")["parameters"]]  # after the first stage
    same = [any(u.shape == v.shape and torch.equal(u.bfloat16(), v) for v in before) for u in scores.values()]
    assert all(same) == (teach == "compressor")


def test_an_interrupted_stage_goes_on(run, monkeypatch):
    stages = importlib.import_module("stages")
    _, whole = run(*STAGES, output="whole")
    monkeypatch.setattr(stages, "SAVED_EVERY", 1)
    original, calls = stages.learn_scores, []

    def interrupted(model, ids):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(model, ids)

    monkeypatch.setattr(stages, "learn_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*STAGES)
    _, resumed = run(*STAGES, "--resume")
    assert len(calls) == 3 + 2  # two of the four steps were done
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-2, atol=1e-4, msg=name)


def in_two(rank: int, folder: str) -> None:
    """One of two processes: the first stage of a small model, on its part of the texts."""
    sys.path.insert(0, str(EXAMPLES))
    stages, planting = importlib.import_module("stages"), importlib.import_module("planting")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = retrofit(base(max_position_embeddings=1024), None, window_size=20, eviction=SalientSlots(4, score_size=4))
    encode = lambda text: [1 + ord(c) % 60 for c in text]
    crops = planting.PlantedCrops([torch.arange(3000) % 60 + 1], 560, 4, encode, seed=0)
    errors = stages.learn_attention(model, "stage", crops, 1, "cpu")
    weights = {name: u.detach() for name, u in adapter_parameters(model)}
    torch.save((errors, weights), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_learn_one_set_of_scores_from_different_texts(tmp_path):
    torch.multiprocessing.spawn(in_two, (str(tmp_path),), nprocs=2)
    (mine, weights), (other, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(mine) == len(other) == 2 and mine != other
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name
    assert any(value.any() for name, value in weights.items() if name.endswith("down"))


@pytest.mark.parametrize("options, message", [
    (["--score-steps", "2"], "this memory has no slots. Give some by --slots"),
    (["--slots", "5", "--align-steps", "2"], "--align-steps: not for memories with slots"),
    (["--slots", "5", "--compile"], "--compile: not with --slots"),
    (["--slots", "5", "--start-from", "a"], "the adapter of --start-from has its own"),
    (["--slots", "5", "--facts", "4", "2"], "expected the smaller number first"),
    (["--slots", "5", "--draw-sinks", "4", "--copies", "0.1"], "--draw-sinks, --copies: not for a memory with slots"),
    (["--temperature", "0.1"], "--temperature: not for a memory without slots. Leave it out"),
    (["--truth", "0.3"], "--truth: not for a memory without slots. Leave it out"),
    (["--slots", "5", "--coverage", "0"], "--coverage 0: expected a share above 0"),
    (["--slots", "5", "--temperature", "0"], "--temperature 0: expected a positive number"),
    (["--slots", "100", "--dev", "text.txt", "--dev-length", "120"], "--dev-length 120: expected at least 134"),
])  # fmt: skip
def test_options_that_do_not_fit(run, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_slots_by_layer_outlive_an_interruption(run, monkeypatch):
    """A run that is resumed goes on with the slots of its checkpoint."""

    def slots():
        described = json.loads(Path("out/adapter.json").read_text())["evictions"]
        return sorted((layer, one["options"]["num_slots"]) for one in described for layer in one["layers"])

    monkeypatch.setattr(importlib.import_module("train"), "set_slots", partial(set_slots, coverage=0.01))
    run(*STAGES, "--slots-by-layer")
    before = slots()
    run(*STAGES, "--slots-by-layer", "--resume", "--steps", "3")
    assert slots() == before and len({count for _, count in before}) == 2
