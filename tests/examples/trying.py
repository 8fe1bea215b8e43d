"""Small models and a tokenizer to try the examples with."""

import importlib
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ahn_layers import GatedDeltaNet, SalientSlots, adapter_parameters, retrofit, save_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib")
import needles  # noqa: E402


def tokenizer():
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=alphabet[0], pad_token=alphabet[0])


def base(length=4096):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def small(window_size=24, num_sinks=8, compressor=GatedDeltaNet, eviction=None):
    model = retrofit(base(), compressor, window_size=window_size, num_sinks=num_sinks, eviction=eviction).eval()
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def workplace(monkeypatch, tmp_path):
    """The current folder: a small model with its tokenizer in ``model``, and ``text.txt``; scripts can be imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    chat = importlib.import_module("_chat")
    torch.manual_seed(0)
    model, tokens = chat.random_model(LlamaConfig(**chat.SMALL, num_key_value_heads=2))
    model.save_pretrained("model")
    tokens.save_pretrained("model")
    words = " ".join(f"the {n} of {m} went home." for n in range(60) for m in range(40))
    (tmp_path / "text.txt").write_text(words)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, an adapter and a text on disk."""
    root = tmp_path_factory.mktemp("evaluate")
    base().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    save_adapter(small(), root / "adapter")
    save_adapter(small(eviction=SalientSlots(16)), root / "slots")
    save_adapter(small(compressor=None, eviction=SalientSlots(16)), root / "slots alone")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return root


def made(task, seed=0, length=2400, **options):
    """An example and its prompt as text."""
    example = needles.make(task, tokenizer().encode, [32] * length, length, 0.5, random.Random(seed), **options)
    return example, tokenizer().decode(example.prompt)


def noting(weights, distillation_loss):
    """A ``distillation_loss`` that notes the weights of the answers, and whether there were answers."""

    def noted(*args, answers=None, answer_weight=1.0, answer_ce_weight=0.0, **kwargs):
        weights.append((answer_weight, answer_ce_weight, answers is not None))
        own = {"answer_weight": answer_weight, "answer_ce_weight": answer_ce_weight}
        return distillation_loss(*args, answers=answers, **own, **kwargs)

    return noted
