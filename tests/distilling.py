"""A tiny model to distil, texts, and a trainer."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from ahn_layers import GatedDeltaNet, adapter_parameters, retrofit
from ahn_layers.distillation import DistillationTrainer, freeze_base

VOCAB, CAPACITY = 61, 16


def small(dtype=torch.float32, trained=True, **config):
    """A tiny retrofitted model whose memory already says something."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **config)).to(dtype)
    model = retrofit(base, GatedDeltaNet, window_size=12, num_sinks=4)
    freeze_base(model)
    if trained:
        with torch.no_grad():
            for _, parameter in adapter_parameters(model):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def text(rows=2, length=48, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: p.grad.clone() for name, p in adapter_parameters(model)}


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"input_ids": text(1, 40, seed=100 + index)[0]}


def trainer(folder: Path, model=None, callbacks=(), **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "save_steps": 3, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "seed": 5,
        "per_device_eval_batch_size": 1,
    }  # fmt: skip
    eval_dataset = [Texts()[i] for i in range(3)]
    return DistillationTrainer(
        model or small(trained=False), TrainingArguments(**(settings | changes)), sinks=(2, 4), shortest=0.0,
        train_dataset=Texts(), eval_dataset=eval_dataset, callbacks=list(callbacks),
    )  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in adapter_parameters(model)}


def losses(run):
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
