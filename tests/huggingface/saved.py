"""Models to save, and whether they come back as they were."""

import torch

from ahn_layers import Mamba2, adapter_parameters
from ahn_layers.record import find_retrofitted

from ..models import CAPACITY, generate, logits, retrofitted, tokens

LONG = 4 * CAPACITY


def make(**options):
    return retrofitted(dtype=torch.float32, **options)


def memory(model):
    return {name: u.detach().clone() for name, u in adapter_parameters(model)}


def assert_same(model, other, *, outputs=True):
    """Class, retrofit, every weight bit for bit, and what comes out."""
    assert type(other) is type(model)
    ours, theirs = find_retrofitted(model)[1], find_retrofitted(other)[1]
    for name in ("window", "compressor", "memory_positions", "options", "layers"):
        assert getattr(ours, name) == getattr(theirs, name), name
    mine, its = model.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(u, its[name]) and u.dtype == its[name].dtype for name, u in mine.items())
    assert not any(module.training for module in other.modules())
    if not outputs:
        return
    ids = tokens(2, LONG)
    assert torch.equal(logits(model, ids), logits(other, ids))
    assert torch.equal(generate(model, ids), generate(other, ids))


OPTIONS = {
    "default": {},
    "layers": {"layers": [1]},
    "positions": {"memory_positions": "none", "sink_positions": "streaming"},
    "options": {"compressor": Mamba2, "shared_state": True},
    "window alone": {"compressor": None, "window_size": 5, "num_sinks": 0},
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<s>")
