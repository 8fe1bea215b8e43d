"""The model of a type, and a prompt for it."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checks import Case, one_pass
from .shrink import initialise, tiny_config


def all_names(kind: str | None = None) -> list[str]:
    """Every case: a type, or with images and the like ``image/type``."""
    causal = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return causal if kind != "multimodal" else []


def build(name: str) -> Case:
    """The model of a case with its prompt, in float64 if the model can do that."""
    config = tiny_config(name)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    initialise(model)
    case = Case(model, torch.tensor([[5, 6]]))
    one_pass(model, case, case.text(3))
    try:
        one_pass(model.double(), case, case.text(3))
    except Exception:
        model.float()
    return case
