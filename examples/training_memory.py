"""What training a memory takes on a GPU, by model, length and batch: computed from what autograd keeps for one layer.

    python examples/training_memory.py                                    # shapes of Llama 3.2 1B and 3B and 3.1 8B
    python examples/training_memory.py --shape smollm2-135m --lengths 8192 --batches 8
    python examples/training_memory.py --measure --shape llama-3.2-1b --lengths 4096 --batches 1    # a step, on a GPU

One and two layers of the shape run a student's forward pass on the CPU, in bfloat16, and the bytes that autograd keeps
are counted. The difference is a layer; it grows with the tokens of the batch. Compiled layers on a GPU keep about a
third of that, a share that was measured (``KEPT_ON_GPU``). Weights, the memory's optimiser and the logits of a slice
are added. You will see gigabytes with and without gradient checkpointing; ``--measure`` runs a step of distillation
with random weights and prints the peak.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from _common import Help, compressor_names, device, positive, user_errors
from gpu_measurements import SHAPES
from peak_memory import PeakMemory
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ahn_layers import Compressor, adapter_parameters, retrofit
from ahn_layers.distillation import compile_layers, distillation_loss, freeze_base

LLAMA = {"vocab_size": 128_256, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
MODELS = {
    "llama-3.2-1b": LlamaConfig(
        **LLAMA | {"head_dim": 64}, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, tie_word_embeddings=True,
    ),
    "llama-3.2-3b": LlamaConfig(
        **LLAMA, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=False, eos_token_id=None,
    ),
    **SHAPES,
}  # fmt: skip
SLICE = 1024
"""Tokens whose logits exist at a time, in float32: student, teacher, and their gradient."""
TRAINED = 4 + 4 + 8
"""Bytes of a parameter that is trained: itself and its gradient in float32, and AdamW's two moments."""
KEPT_ON_GPU = 0.352
"""Of the bytes counted on the CPU, what compiled layers keep on a GPU.

Peaks of a student's step on one H100 (2026-11-25, window 1,920, ``gpu_benchmark.py --parts training``), less the
weights: 42.3 GB for SmolLM2-135M, 8 sequences of 8,192 tokens, a share of 0.344; 28.0 GB for Qwen2.5-3B, one such
sequence, a share of 0.360.
"""
PROBE = 512
"""Tokens of the pass whose kept bytes are counted."""


def build(config: Any, layers: int, args: argparse.Namespace, place: str = "cpu", share: float = 0.125) -> Any:
    """A random model of some layers with a memory that is trained, window and sinks a share of ``PROBE``."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    window = max(1, int(share * PROBE) - 4) if share < 1 else int(share)
    retrofit(model, Compressor.by_name[args.compressor], window_size=window, num_sinks=4)
    freeze_base(model)
    return model.train()


def kept_bytes(model: Any, tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass of a student, each storage once, parameters aside."""
    seen: dict[int, int] = {}
    alive: list[Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(u: Tensor) -> Tensor:
        storage = u.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(u)
        return u

    embedded = model.get_input_embeddings()(torch.randint(model.config.vocab_size, (1, tokens)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda u: u):
        model.base_model(inputs_embeds=embedded.detach().requires_grad_(True), use_cache=False)
    return sum(seen.values())


def per_token(config: Any, args: argparse.Namespace) -> float:
    """Bytes that a compiled layer keeps for each token of the batch on a GPU."""
    narrow = copy.deepcopy(config)
    narrow.vocab_size = 128  # of no effect on a layer
    one, two = (kept_bytes(build(narrow, layers, args), PROBE) for layers in (1, 2))
    return KEPT_ON_GPU * (two - one) / PROBE


def account(config: Any, kept: float, length: int, batch: int, args: argparse.Namespace) -> tuple[float, float]:
    """Gigabytes of a step without and with gradient checkpointing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = 2 * sum(p.numel() for p in model.parameters())
        heads = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        memory = Compressor.by_name[args.compressor](hidden_size=config.hidden_size, head_dim=size, **heads)
    layers, tokens = config.num_hidden_layers, length * batch
    trained = TRAINED * layers * sum(p.numel() for p in memory.parameters())
    ends = (
        3 * 4 * SLICE * config.vocab_size + 3 * 2 * tokens * config.hidden_size
    )  # logits; hidden states of two models
    fixed = weights + trained + ends
    between = 2 * config.hidden_size * tokens * layers
    return (fixed + kept * tokens * layers) / 1e9, (fixed + between + kept * tokens) / 1e9


def measure(name: str, length: int, batch: int, args: argparse.Namespace) -> float | None:
    """The peak of a step of distillation with random weights, in GB: weights and all."""
    place = torch.device(args.device)
    with PeakMemory(place) as peak:
        model = build(MODELS[name], MODELS[name].num_hidden_layers, args, args.device, share=length // 8)
        if place.type == "cuda":
            compile_layers(model)
        optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(model)])
        ids = torch.randint(model.config.vocab_size, (batch, length), device=place)
        for _ in range(2):
            distillation_loss(model, ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return None if peak.nbytes is None else peak.nbytes / 1e9


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, int, int], tuple[float, float]]:
    """Print the table.

    Returns:
        Gigabytes without and with gradient checkpointing, by shape, length and batch.
    """
    args = parse(argv)
    found, lines = {}, []
    for name in tqdm(args.shape, desc="counting", unit=" shapes"):
        kept = per_token(MODELS[name], args)
        for length in args.lengths:
            for batch in args.batches:
                plain, less = found[name, length, batch] = account(MODELS[name], kept, length, batch, args)
                lines.append(f"{name:14}{kept / 1e3:12.1f}{length:10,}{batch:7}{plain:12.1f}{less:16.1f}")
                if args.measure:
                    with user_errors("training_memory"):
                        peak = measure(name, length, batch, args)
                    lines[-1] += "   measured: unknown" if peak is None else f"   measured: {peak:.1f} GB"
    print(f"{'':14}{'kB a token':>12}{'':10}{'':7}{'':12}{'with gradient':>16}")
    print(f"{'shape':14}{'and layer':>12}{'length':>10}{'batch':>7}{'GB':>12}{'checkpointing':>16}")
    print("\n".join(lines))
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add(
        "--shape",
        nargs="+",
        default=[u for u in MODELS if u.startswith("llama")],
        choices=sorted(MODELS),
        help="sizes of the model",
    )
    add("--lengths", type=positive, nargs="+", default=[2048, 8192], help="tokens of a sequence (default: 2048 8192)")
    add("--batches", type=positive, nargs="+", default=[1, 4], help="sequences of a step (default: 1 4)")
    add("--compressor", default="GatedDeltaNet", choices=compressor_names(), help="the memory's recurrence")
    add("--measure", action="store_true", help="also run steps, compiled on a GPU, without gradient checkpointing")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="for --measure")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
