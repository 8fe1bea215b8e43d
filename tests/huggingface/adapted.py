"""Retrofitted models that PEFT adapts."""

import warnings

import peft
import torch

from ..models import CAPACITY, base, retrofitted, tokens

warnings.filterwarnings("ignore", module="peft")

F32 = torch.float32
LONG = 4 * CAPACITY
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(targets=USUAL, **options):
    """A LoRA that changes something from the start."""
    return peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)


def wrapped(config, order="retrofit first"):
    """The retrofitted model inside PEFT's, made in one order or the other; with the same weights in both."""
    if order == "retrofit first":
        model = retrofitted(dtype=F32)
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)
    model = base(dtype=F32)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    retrofitted(model=model.get_base_model())
    return model


def adapted(model):
    """Names of the modules that PEFT put an adapter on."""
    return [name for name, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def train_step(model, length=LONG):
    """The gradients of every trainable parameter after one step."""
    model.train()
    model.zero_grad(set_to_none=True)
    ids = tokens(2, length)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
