"""Tiny random models of many families, the table that the tests of the transformers side run over.

``python -m tests.models`` measures the table and prints it as Markdown.
"""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ahn_layers import Compressor, GatedDeltaNet, adapter_parameters, retrofit
from ahn_layers.retrofit import find_retrofitted

WINDOW, SINKS = 6, 2
CAPACITY = WINDOW + SINKS
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NARROW = 9
"""The models' own sliding windows: a little more than the capacity."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as transformers calls it.
        trait: what is special about its attention.
        options: of its config, beside ``SIZES``.
        layers: the layers that get a memory, by default.
        turns: whether its queries can be turned back, so that sinks stay within the trained distance.
        mixes: whether layers that were left alone carry tokens along: there a pad in the middle is not nothing.
        expands: whether its own cache holds something that keys are computed from, so that it rounds differently.
    """

    model_type: str
    trait: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = (0, 1, 2)
    turns: bool = True
    mixes: bool = False
    expands: bool = False


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2", "biases"),
    "qwen3": Family("qwen3", "norms of queries and keys"),
    "mistral": Family("mistral", options={"sliding_window": None}),
    "mistral_window": Family("mistral", "its own window in every layer", {"sliding_window": NARROW}),
    "phi3": Family("phi3", "fused projections"),
    "gemma2": Family(
        "gemma2", "softcap, eager, own windows", {"sliding_window": NARROW, "layer_types": ALTERNATING}, (1,), mixes=True
    ),
    "gemma3": Family(
        "gemma3_text", "own windows", {"sliding_window": NARROW, "layer_types": ALTERNATING}, (1,), mixes=True
    ),
    "olmo2": Family("olmo2", "norms after the blocks"),
    "gpt_neox": Family("gpt_neox", "partial rotation", {"rotary_pct": 0.5}),
    "glm": Family("glm", "partial rotation of neighbouring channels"),
    "cohere2": Family(
        "cohere2", "no positions in full layers", {"sliding_window": NARROW, "layer_types": ALTERNATING}, (1,),
        mixes=True,
    ),  # fmt: skip
    "smollm3": Family("smollm3", "no positions in some layers", {"no_rope_layers": [1, 0, 1]}),
    "deepseek_v3": Family(
        "deepseek_v3", "latent attention",
        {
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
        expands=True,
    ),  # fmt: skip
    "mixtral": Family("mixtral", "experts", EXPERTS),
    "llama4": Family(
        "llama4_text", "chunked layers",
        EXPERTS | {
            "intermediate_size_mlp": 48, "attention_chunk_size": NARROW, "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        },
        (1,), mixes=True,
    ),  # fmt: skip
    "lfm2": Family(
        "lfm2", "convolutions between", {"layer_types": ["conv", "full_attention", "conv"]}, (1,), mixes=True
    ),
    "gpt2": Family("gpt2", "learned positions", turns=False),
    "opt": Family(
        "opt", "learned positions", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, turns=False
    ),
}  # fmt: skip
LACKING = {"gpt2": ("intermediate_size", "num_key_value_heads", "head_dim")}
"""Sizes that a config does not have."""

REFUSED = {
    "gpt_oss": ("learned sink logits are not supported", EXPERTS),
    "diffllama": ("calls the attention function 2 times in one forward", {}),
    "doge": ("makes a mask of its own", {}),
    "falcon_h1": ("attends by hybrid", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "bloom": ("does not use the attention interface", {"n_head": 4}),
}
"""Families that cannot be retrofitted: what the error says, and their options."""


def base(name: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """The unmodified model of a family, the same at every call; weights large enough for sharp attention."""
    return copy.deepcopy(_base(name, dtype, tuple(sorted(options.items()))))


@functools.lru_cache(maxsize=None)
def _base(name: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    if name in FAMILIES:
        model_type, own = FAMILIES[name].model_type, FAMILIES[name].options
    else:
        model_type, own = name, REFUSED[name][1]
    sizes = {key: value for key, value in SIZES.items() if key not in LACKING.get(model_type, ())}
    config = AutoConfig.for_model(model_type, **sizes | own | dict(options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def retrofitted(
    name: str = "llama",
    dtype: torch.dtype = torch.float64,
    compressor: type[Compressor] | None = GatedDeltaNet,
    *,
    model: PreTrainedModel | None = None,
    window_size: int = WINDOW,
    num_sinks: int = SINKS,
    **options: Any,
) -> PreTrainedModel:
    """The model of a family (or the one given) with a memory of random weights, the same at every call."""
    model = base(name, dtype) if model is None else model
    retrofit(model, compressor, window_size=window_size, num_sinks=num_sinks, **options)
    train_memory(model)
    return model


@torch.no_grad()
def train_memory(model: torch.nn.Module, seed: int = 0) -> None:
    """Random memory weights, so that the memory contributes: fresh ones add nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter_parameters(model):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them the pad token."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, as ``generate`` makes them."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor, cuts: list[int] | None = None, cache: Any = None, **options: Any):
    """Logits of a text in one pass without cache, or, with ``cuts`` (sizes of the pieces), piece by piece with one."""
    if cuts is None:
        return model(input_ids=ids, use_cache=False, **options).logits
    outs = []
    for piece in ids.split(cuts, dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        outs.append(out.logits)
    return torch.cat(outs, dim=1)


def greedy(model: torch.nn.Module, ids: Tensor, count: int) -> Tensor:
    """Greedy continuation by hand: the whole text anew for every token, without any cache."""
    for _ in range(count):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def generate(model: Any, ids: Tensor, count: int = 8, **options: Any) -> Any:
    """Greedy ``generate``, unless options say otherwise."""
    return model.generate(ids, **{"max_new_tokens": count, "do_sample": False} | options)


def table() -> str:
    """The families as a Markdown table, measured now."""
    rows = ["| model type | special | layers with a memory | sinks | inside the window | beyond: cached - uncached |"]
    rows.append("|---|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        model, short, long = retrofitted(name), tokens(1, CAPACITY), tokens(1, 40)
        record = find_retrofitted(model)[1]
        exact = torch.equal(logits(base(name), short), logits(model, short))
        difference = (logits(model, long) - logits(model, long, [1] * 40)).abs().max()
        rows.append(
            f"| `{family.model_type}` | {family.trait} | {len(record.layers)} of {len(record.layers) + len(record.skipped)}"
            f" | {'turned back' if family.turns else 'at true distance'} | {'bit-identical' if exact else 'DIFFERS'}"
            f" | {difference:.0e} |"
        )
    for name in REFUSED:
        try:
            retrofit(base(name), GatedDeltaNet, window_size=WINDOW)
        except ValueError as error:
            reason = str(error).removesuffix(".").split("\n")[-1].split(": ", 1)[-1]
            rows.append(f"| `{name}` | refused | {reason} | | | |")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
