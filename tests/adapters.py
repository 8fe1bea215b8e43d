"""Small models with a memory, and their adapters."""

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ahn_layers import GatedDeltaNet, adapter_parameters, retrofit

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def plain(seed=0, dtype=torch.float32, **sizes):
    """A tiny base model; another seed is a sibling, another checkpoint of the same architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).to(dtype).eval()


def make(compressor=GatedDeltaNet, model=None, **options):
    """A retrofitted tiny model with random memory weights."""
    model = plain() if model is None else model
    retrofit(model, compressor, window_size=6, num_sinks=2, **options)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.normal_()
    return model


def weights(model):
    return {name: u.detach().clone() for name, u in adapter_parameters(model)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(u, other[name]) for name, u in one.items())


def released(model, path, **changes):
    """The model's memory in the released naming, with changes: name -> tensor, or None to leave it out."""
    tensors = {}
    for name, u in weights(model).items():
        layer = name.split(".")[2]
        tensors[f"model.layers.{layer}.ahn.fn.{name.split('.compressor.')[1]}"] = u
    tensors["model.layers.0.ahn.fn.D"] = torch.ones(4)
    tensors["model.embed_tokens.weight"] = torch.ones(2, 2)  # full checkpoints hold the base as well
    for name, u in changes.items():
        tensors[name] = u
    save_file({name: u for name, u in tensors.items() if u is not None}, path)


def interrupt(*_):
    raise KeyboardInterrupt
