"""Saving by others: to the hub, by a Trainer, and with PEFT."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ahn_layers import load_adapter
from ahn_layers.record import find_retrofitted

from ..models import base, logits, tokens
from .saved import LONG, assert_same, make, memory


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that keeps what it is sent in a folder."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    uploads = []

    def upload(self, folder, repo_id, files_timestamps, **options):
        shutil.copytree(folder, tmp_path / "hub", dirs_exist_ok=True)
        uploads.append((repo_id, files_timestamps, options))

    repo = lambda *args, **options: SimpleNamespace(repo_id=(args or (options["repo_id"],))[0])
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **options: repo(*args, **options))
    monkeypatch.setattr(huggingface_hub, "create_repo", repo)
    if hasattr(hub, "create_repo"):
        monkeypatch.setattr(hub, "create_repo", repo)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", hub.create_and_tag_model_card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    return uploads


def test_push_to_hub(hub, tmp_path):
    model = make()
    model.push_to_hub("someone/model", max_shard_size="20KB")
    assert hub[0][0] == "someone/model"
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "hub"))


def test_push_to_hub_while_saving(hub, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="someone/model", commit_message="first")
    assert hub[0][0] == "someone/model" and hub[0][2]["commit_message"] == "first"
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "hub"))
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert hub[1][0] == "model" and "config.json" in hub[1][1]


def trainer(model, folder, steps):
    data = [{"input_ids": u, "labels": u} for u in tokens(8, 20)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize("options", [{}, {"compressor": None}])
def test_checkpoints_of_a_trainer(options, tmp_path):
    """All weights are trained; training goes on from a checkpoint as if it had not stopped."""
    model = make(**options)
    trainer(model, tmp_path, 4).train()
    assert_same(model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))
    other = make(**options)
    trainer(other, tmp_path / "other", 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(model, other.eval())


def test_lora_around_it(tmp_path):
    lora = get_peft_model(make(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").glob("*.safetensors")) == ["adapter_model.safetensors"]
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_same(merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


def test_lora_around_a_model_that_was_loaded(tmp_path):
    """PEFT reads the base's config where the model came from, and loads the model from there."""
    make().save_pretrained(tmp_path)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    lora.save_pretrained(tmp_path / "lora")
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert find_retrofitted(other)[1].layers == [0, 1, 2]
    assert torch.equal(logits(lora.eval(), tokens(1, LONG)), logits(other, tokens(1, LONG)))


def test_lora_inside_it(tmp_path, monkeypatch):
    """Transformers writes the LoRA alone; the memory goes beside it."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = make()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "config.json" not in names and "adapter_model.safetensors" in names
    other = load_adapter(base(dtype=torch.float32), tmp_path)
    assert all(torch.equal(u, memory(other)[name]) for name, u in memory(model).items())
