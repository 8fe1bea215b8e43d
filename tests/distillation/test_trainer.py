"""Distillation under transformers' Trainer: resuming, checkpoints, evaluation, interruption."""

import os
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from ahn_layers import adapter_parameters
from ahn_layers.distillation import DistillationTrainer, arm_losses, gap_closed

from ..distilling import Texts, losses, small, text, trainer, weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(tmp_path, accumulate):
    whole = trainer(tmp_path / "whole", gradient_accumulation_steps=accumulate)
    whole.train()
    again = trainer(tmp_path / "again", gradient_accumulation_steps=accumulate)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again)[6] == losses(whole)[6]
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_checkpoints_hold_the_memory_alone(tmp_path):
    run = trainer(tmp_path)
    run.train()
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter.safetensors" in files and not any("model" in name for name in files)
    memory = sum(p.numel() * 4 for _, p in adapter_parameters(run.model))
    assert (tmp_path / "checkpoint-6" / "adapter.safetensors").stat().st_size < 1.2 * memory + 10_000


def test_three_arms_are_reported(tmp_path):
    run = trainer(tmp_path, small())
    metrics = run.evaluate()
    ids = torch.stack([Texts()[i]["input_ids"] for i in range(3)])
    expected = {arm: float(loss.mean()) for arm, loss in arm_losses(run.model, ids).items()}
    for arm, value in expected.items():
        assert metrics[f"eval_{arm}"] == pytest.approx(value, rel=1e-5)
    gap = metrics["eval_window"] - metrics["eval_full"]
    assert ("eval_gap_closed" in metrics) == (gap > 4.303 * metrics["eval_gap_error"])


@pytest.mark.parametrize("gap, significant", [(1.0, True), (0.02, False), (-1.0, False)])
def test_a_share_is_reported_of_a_significant_gap_alone(gap, significant, tmp_path, monkeypatch):
    def losses(model, ids, **_):
        noise = 0.1 * ids[:, :1].float().div(8).expand(-1, 4)
        return {"full": noise, "window": 2 * noise + gap, "memory": 2 * noise + gap / 2}

    monkeypatch.setattr("ahn_layers.distillation.trainer.arm_losses", losses)
    metrics = trainer(tmp_path, small()).evaluate()
    assert ("eval_gap_closed" in metrics) == significant
    if significant:
        arms = {arm: metrics[f"eval_{arm}"] for arm in ("full", "window", "memory")}
        assert metrics["eval_gap_closed"] == pytest.approx(gap_closed(**arms))
    assert "eval_gap_closed" not in trainer(tmp_path, small()).evaluate([{"input_ids": text(1, 40)[0]}])


def test_an_evaluation_of_nothing_is_refused(tmp_path):
    run = trainer(tmp_path, small())
    with pytest.raises(ValueError, match=r"capacity of 16 tokens.*longer sequences"):
        run.evaluate([{"input_ids": ids} for ids in text(3, 16)])
    assert run.evaluate([{"input_ids": ids} for ids in (text(1, 16)[0], text(1, 18)[0])])["eval_loss"] > 0


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interruption_leaves_a_checkpoint_to_go_on_from(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path / "stopped", callbacks=[Interrupt()])
    run.train()
    assert run.state.global_step == 2 and signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "stopped" / "checkpoint-2" / "adapter.safetensors").exists()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    whole = trainer(tmp_path / "whole")
    whole.train()
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_a_model_without_a_memory_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match="no memory"):
        trainer(tmp_path, LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1,
                                                       num_hidden_layers=1, intermediate_size=8)))  # fmt: skip


IGNORED = {
    "padding": {"attention_mask": torch.arange(40) > 3},
    "labels of its own": {"labels": torch.full((40,), -100)},
    "packed texts": {"position_ids": torch.arange(40) % 20},
    "numbers of texts": {"seq_idx": torch.arange(40) // 20},
    "embeddings": {"inputs_embeds": torch.zeros(40, 32)},
}


@pytest.mark.parametrize("more", IGNORED.values(), ids=IGNORED)
def test_what_it_would_ignore_is_refused(more, tmp_path):
    texts = [{"input_ids": text(1, 40)[0]} | more] * 2
    run = trainer(tmp_path, small(), max_steps=1, save_steps=9)
    run.train_dataset = texts
    for use in (run.train, lambda: run.evaluate(texts)):
        with pytest.raises(
            ValueError, match=f"the batch holds {next(iter(more))} .*, which the distillation would ignore"
        ):
            use()


def test_what_says_nothing_is_left_alone(tmp_path):
    ids = text(1, 40)[0]
    more = {"attention_mask": torch.ones(40).long(), "labels": ids, "position_ids": torch.arange(40), "number": 3}
    assert trainer(tmp_path, small()).evaluate([{"input_ids": ids} | more] * 2)["eval_loss"] > 0


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"compute_loss_func": print},
        {"bf16_full_eval": True},
    ],
)
def test_what_the_distillation_has_no_use_for_is_refused(option, tmp_path):
    (name,) = option
    others = {} if name == "compute_loss_func" else option
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **others)
    with pytest.raises(ValueError, match=f"{name}=.*: the loss is the distance to full attention"):
        DistillationTrainer(small(), args, **{k: v for k, v in option.items() if k not in others})


def test_several_datasets_are_evaluated_by_name(tmp_path):
    run, data = trainer(tmp_path, small()), [Texts()[i] for i in range(3)]
    metrics = run.evaluate({"first": data[:2], "all": data})
    assert metrics["eval_all_memory"] == run.evaluate(data)["eval_memory"] != metrics["eval_first_memory"]
