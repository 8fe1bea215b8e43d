"""Every way to go wrong: an error that says what was given, what was expected and what to do, and nothing changed.

Each provoked message has its row, with a remedy, in ``docs/guides/troubleshooting.md``.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from ahn_layers import (
    DeltaNet,
    GatedDeltaNet,
    HippocampalAttention,
    HippocampalCache,
    Mamba2,
    MemoryState,
    MemoryStore,
    Rotary,
    SalientSlots,
    Window,
    full_attention,
    load_adapter,
    memory_report,
    restore,
    retrofit,
    save_adapter,
    window_only,
)
from ahn_layers.ops.decode.rule import StepRule

from .models import SINKS, WINDOW, base, logits, retrofitted, tokens
from .refusing import LONG, refused, size

pytestmark = pytest.mark.usefixtures("unchecked")


def block(calls=1):
    """A custom block that attends so many times."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = calls

        def forward(self, x, attend):
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            for _ in range(self.calls):
                x = attend(q, q, q).transpose(1, 2).flatten(2)
            return x

    return Block()


def custom(calls=1):
    return HippocampalAttention(block(calls), MemoryStore(Window(5, num_sinks=1), GatedDeltaNet(32, 4, 8)))


def with_memory_child():
    module = block()
    module.memory = nn.Linear(1, 1)
    return module


WHOLE = "expected a whole number of at least"
MAKING = {
    "no window": (size(window_size=0), ValueError, "window_size=0", f"{WHOLE} 1."),
    "a negative window": (size(window_size=-3), ValueError, "window_size=-3", f"{WHOLE} 1."),
    "a window of bool": (size(window_size=True), ValueError, "window_size=True", f"{WHOLE} 1."),
    "a window of float": (size(window_size=4.0), ValueError, "window_size=4.0", f"{WHOLE} 1."),
    "a window of text": (size(window_size="4"), ValueError, "window_size='4'", f"{WHOLE} 1."),
    "a window of None": (size(window_size=None), ValueError, "window_size=None", f"{WHOLE} 1."),
    "negative sinks": (size(num_sinks=-1), ValueError, "num_sinks=-1", f"{WHOLE} 0."),
    "sinks of bool": (size(num_sinks=False), ValueError, "num_sinks=False", f"{WHOLE} 0."),
    "sinks of float": (size(num_sinks=0.5), ValueError, "num_sinks=0.5", f"{WHOLE} 0."),
    "sink positions": (
        size(sink_positions="near"), ValueError, "sink_positions='near'", "('trained', 'streaming', 'absolute')",
    ),
    "memory positions": (
        lambda: MemoryStore(Window(4), memory_positions="near"), ValueError, "memory_positions='near'",
        "('absolute', 'none')",
    ),
    "no rotation to undo": (
        lambda: MemoryStore(Window(4), memory_positions="none"), ValueError, "memory_positions='none'",
        "expected rotary=Rotary(...)",
    ),
    "options of no compressor": (
        lambda: retrofit(base(), None, window_size=4, num_sink=2), TypeError, "num_sink=2", "knows no such argument",
        "leave it out",
    ),
    "an option that the compressor has not": (
        lambda: retrofit(base(), GatedDeltaNet, window_size=4, num_sink=2), TypeError, "num_sink=2",
        "knows no such argument", "compressor=GatedDeltaNet has no such option",
    ),
    "no layers": (lambda: retrofit(base(), None, window_size={}), ValueError, "no suitable attention layer", "asked"),
    "no heads": (lambda: GatedDeltaNet(32, 0, 8), ValueError, "num_heads=0", "expected a positive whole number"),
    "no channels": (lambda: Mamba2(32, 4, -8), ValueError, "head_dim=-8", "expected a positive whole number"),
    "heads that do not divide": (
        lambda: DeltaNet(32, 4, 8, num_kv_heads=3), ValueError, "num_heads=4", "num_kv_heads=3", "the same number",
    ),
    "frequencies": (lambda: Rotary(torch.ones(2, 2), 8), ValueError, "(2, 2)", "one frequency per rotated pair"),
    "trained length": (lambda: Rotary(torch.ones(2), 0), ValueError, "trained_length=0", "a positive number of tokens"),
    "whole frequencies": (
        lambda: Rotary(torch.arange(4), 8), ValueError, "inv_freq is torch.int64", "expected angular frequencies",
    ),
    "frequencies in a list": (lambda: Rotary([1.0, 0.1], 8), TypeError, "inv_freq is of type list", "torch.tensor"),
    "more rotated channels than there are": (
        lambda: MemoryStore(Window(4), None, Rotary(torch.ones(4), 8, start=2))(*torch.ones(3, 1, 1, 2, 8)),
        ValueError, "8 channels from channel 2 on", "q has 8", "one frequency for each pair",
    ),
    "a part of a token": (lambda: Rotary(torch.ones(2), 8.5), ValueError, "trained_length=8.5", "a positive number"),
    "rotated from the end": (lambda: Rotary(torch.ones(2), 8, start=-2), ValueError, "start=-2", "from 0"),
    "a class of compressors": (
        lambda: MemoryStore(Window(4), GatedDeltaNet), TypeError, "compressor=<class", "an object of Compressor",
    ),
    "a class of evictions": (
        lambda: MemoryStore(Window(4), eviction=SalientSlots), TypeError, "eviction=<class", "an object of Eviction",
    ),
    "a number for a window": (lambda: MemoryStore(4), TypeError, "window=4", "expected an object of Window"),
    "frequencies for a rotation": (
        lambda: MemoryStore(Window(4), None, torch.ones(2)), TypeError, "rotary=tensor", "expected an object of Rotary",
    ),
    "a window for a store": (
        lambda: HippocampalAttention(block(), Window(4)), TypeError, "store=Window", "an object of MemoryStore",
    ),
    "a class of blocks": (
        lambda: HippocampalAttention(nn.Linear, MemoryStore(Window(4))), TypeError, "block=<class", "object of Module",
    ),
    "layers by name": (
        lambda: retrofit(base(), None, window_size=4, layers="all"), TypeError, "layers='all'", "a list of whole",
    ),
    "one layer": (
        lambda: retrofit(base(), None, window_size=4, layers=1), TypeError, "layers=1", "a list of whole numbers",
    ),
    "a rule with momentum": (
        lambda: StepRule(strength="b", delta=True, momentum="m"), ValueError, "momentum and several writes",
        "expected neither",
    ),
    "wrapped twice": (
        lambda: HippocampalAttention(custom(), MemoryStore(Window(4))), ValueError, "Block", "wrap the block once",
    ),
    "a taken name": (
        lambda: HippocampalAttention(with_memory_child(), MemoryStore(Window(4))), ValueError, "Block", "'memory'",
        "rename it",
    ),
    "a block that does not attend": (
        lambda: custom(0)(torch.randn(1, 3, 32)), RuntimeError, "Block did not call attend", "expected attend(q, k, v)",
    ),
    "a block that attends twice": (
        lambda: custom(2)(torch.randn(1, 3, 32)), RuntimeError, "Block called attend twice", "expected exactly once",
        "on its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAKING)
def test_what_cannot_be_made(case):
    provoke, kind, *parts = MAKING[case]
    with refused(kind, *parts):
        provoke()


def put(model, compressor=GatedDeltaNet, **options):
    return retrofit(model, compressor, **{"window_size": WINDOW, "num_sinks": SINKS} | options)


def flex():
    model = base()
    model.config._attn_implementation_internal = "flex_attention"
    return model


def encoder_decoder():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, pad_token_id=0))


def lora():
    return get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))


FIRST = "call retrofit(model, ...) first"
RETROFITTING = {
    "twice": (lambda: put(retrofitted()), ValueError, "LlamaForCausalLM is retrofitted already", "restore(model)"),
    "not of transformers": (lambda: put(nn.Linear(2, 2)), TypeError, "Linear is not", "HippocampalAttention"),
    "inside PEFT": (lambda: put(lora()), TypeError, "PeftModel", "model.get_base_model()"),
    "an encoder-decoder": (lambda: put(encoder_decoder()), ValueError, "BartForCond", "expected a decoder-only"),
    "no attention interface": (
        lambda: put(base("bloom", torch.float32)), ValueError, "BloomForCausalLM", "HippocampalAttention",
    ),
    "another attention": (lambda: put(flex()), ValueError, "'flex_attention'", "('sdpa', 'eager')", "Load the model"),
    "an object for a class": (
        lambda: put(base(), GatedDeltaNet(32, 4, 8)), TypeError, "<GatedDeltaNet object>", "the class, not an object",
    ),
    "another class": (lambda: put(base(), nn.Linear), TypeError, "Linear", "expected a subclass of Compressor"),
    "no such layer": (lambda: put(base(), layers=[0, 3]), ValueError, "no attention layer 3", "[0, 1, 2]"),
    "a layer of another kind": (
        lambda: put(base("llama4"), layers=[0]), ValueError, "layer 0 (model.layers.0.self_attn)", "chunked",
    ),
    "no layer that is suitable": (
        lambda: put(base("diffllama", torch.float32)), ValueError, "no suitable", "model.layers.0.self_attn: calls the",
        "model.layers.1.self_attn", "model.layers.2.self_attn",
    ),
    "windows that are too small": (
        lambda: put(base("mistral_window"), window_size=20), ValueError, "no suitable", "model.layers.0.self_attn",
        "sliding window of 9", "= 22", "model.layers.2.self_attn",
    ),
    "a window that is too small": (
        lambda: put(base("gemma3"), layers=[0], window_size=20), ValueError, "no suitable", "of 9", "= 22",
    ),
    "restoring a plain model": (lambda: restore(base()), ValueError, "LlamaForCausalLM is not retrofitted", FIRST),
    "reporting on a plain model": (lambda: memory_report(base()), ValueError, "LlamaForCausalLM", FIRST),
    "saving from a plain model": (lambda: save_adapter(base(), "nowhere"), ValueError, "LlamaForCausalLM", FIRST),
    "switching a plain model": (lambda: full_attention(base()).__enter__(), ValueError, "LlamaForCausalLM", FIRST),
    "switching a plain module": (lambda: window_only(nn.Linear(1, 1)).__enter__(), ValueError, "Linear", FIRST),
    "restoring twice": (lambda: restore(restore(retrofitted())), ValueError, "LlamaForCausalLM", FIRST),
}  # fmt: skip


@pytest.mark.parametrize("case", RETROFITTING)
def test_what_cannot_be_retrofitted(case):
    provoke, kind, *parts = RETROFITTING[case]
    with refused(kind, *parts):
        provoke()


def spoil_weight(name, change):
    def spoil(folder):
        weights = load_file(folder / "adapter.safetensors")
        weights[name] = change(weights[name])
        save_file(weights, folder / "adapter.safetensors")

    return spoil


def truncate(name, share):
    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return spoil


def flip_header(folder):
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[12] ^= 0xFF
    (folder / "adapter.safetensors").write_bytes(data)


def set_last(value):
    def change(u):
        u.flatten()[-1] = value
        return u

    return change


def describe(**changes):
    def spoil(folder):
        path = folder / "adapter.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


A_LOG, O_PROJ = "layers.1.A_log", "layers.2.o_proj.weight"


ADAPTERS = {
    "infinite": (spoil_weight(O_PROJ, set_last(float("inf"))), "layer 2 'o_proj.weight'", "not finite"),
    "not a number": (spoil_weight(A_LOG, set_last(float("nan"))), "layer 1 'A_log'", "not finite"),
    "shape": (spoil_weight(A_LOG, lambda u: u[:-1].clone()), "layer 1 'A_log' has shape (3,)", "expected (4,)"),
    "transposed": (
        spoil_weight("layers.0.a_proj.weight", lambda u: u.T.contiguous()), "layer 0 'a_proj.weight'", "(32, 4)",
        "expected (4, 32)",
    ),
    "cut in the header": (truncate("adapter.safetensors", 0.01), "adapter.safetensors", "damaged or truncated"),
    "cut in the data": (truncate("adapter.safetensors", 0.99), "adapter.safetensors", "damaged or truncated"),
    "a bit in the header": (flip_header, "adapter.safetensors", "damaged or truncated"),
    "description cut": (truncate("adapter.json", 0.5), "adapter.json", "not the description of an adapter"),
    "another window size kind": (describe(sizes={}), "the adapter has sizes={}", "the model has"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_are_refused(case, tmp_path):
    spoil, *parts = ADAPTERS[case]
    save_adapter(retrofitted(dtype=torch.float32), tmp_path)
    spoil(tmp_path)
    model, ids = put(base(dtype=torch.float32)), tokens(1, LONG)
    expected = logits(model, ids)
    with refused(ValueError, str(tmp_path), *parts):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["cache", "state"])
def test_files_that_are_cut(kind, share, tmp_path):
    model = retrofitted(dtype=torch.float32)
    cache = model(tokens(1, LONG)).past_key_values
    for layer in cache.layers:
        layer.state = layer.state.clone()
    path = tmp_path / "file.safetensors"
    if kind == "cache":
        HippocampalCache.of(cache).save(path)
    else:
        cache.layers[0].state.save(path)
    truncate("file.safetensors", share)(tmp_path)
    with refused(ValueError, "file.safetensors", "damaged or truncated"):
        (HippocampalCache if kind == "cache" else MemoryState).load(path)
    with refused(FileNotFoundError, "no.safetensors: no such file."):
        (HippocampalCache if kind == "cache" else MemoryState).load(tmp_path / "no.safetensors")
