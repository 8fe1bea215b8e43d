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
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.record import find_retrofitted

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


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the table.

    Attributes:
        model_type: as transformers calls it.
        trait: what is special about its attention.
        options: of its config, beside ``SIZES``.
        layers: the layers that get a memory, by default.
        sinks: how they stay within the trained distance; queries are turned back wherever that can be done.
        mixes: whether layers that were left alone see neighbouring tokens: there a pad in the middle is not nothing.
        recurs: whether it has a recurrence of its own, which nothing is too far away for.
        latent: whether its own cache holds what keys are computed from: with it, they are rounded differently.
        attention: the implementation to load it with.
        dtype: in which equality is tested; some families compute in float32, whatever the dtype of their weights.
    """

    model_type: str
    trait: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = (0, 1, 2)
    sinks: str = "turned back"
    mixes: bool = False
    latent: bool = False
    recurs: bool = False
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        """For logits of the size 1 that were computed in two ways."""
        return 1e-9 if self.dtype == torch.float64 else 2e-4


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
INDEXED = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
# fmt: off
FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2", "biases"),
    "qwen3": Family("qwen3", "norms of queries and keys"),
    "mistral": Family("mistral", options={"sliding_window": None}),
    "mistral_window": Family("mistral", "its own window in every layer", {"sliding_window": NARROW}),
    "phi3": Family("phi3", "fused projections"),
    "gemma2": Family(
        "gemma2", "softcap, own windows", {"sliding_window": NARROW, "layer_types": ALTERNATING}, (1,),
        mixes=True, attention="eager", dtype=torch.float32,
    ),
    "gemma3": Family(
        "gemma3_text", "own windows", {"sliding_window": NARROW, "layer_types": ALTERNATING}, (1,), mixes=True
    ),
    "olmo2": Family("olmo2", "norms after the blocks"),
    "gpt_neox": Family("gpt_neox", "partial rotation", {"rotary_pct": 0.5}),
    "glm": Family("glm", "partial rotation of neighbouring channels"),
    "cohere2": Family(
        "cohere2", "no positions in full layers", {"sliding_window": NARROW, "layer_types": ALTERNATING}, (1,),
        sinks="no positions", mixes=True,
    ),
    "smollm3": Family("smollm3", "no positions in some layers", {"no_rope_layers": [1, 0, 1]}),
    "deepseek_v3": Family(
        "deepseek_v3", "latent attention",
        {
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
        latent=True, dtype=torch.float32,
    ),
    "mixtral": Family("mixtral", "experts", EXPERTS),
    "phimoe": Family("phimoe", "own windows that blocks do not know", EXPERTS | {"sliding_window": NARROW}),
    "llama4": Family(
        "llama4_text", "chunked layers",
        EXPERTS | {
            "intermediate_size_mlp": 48, "attention_chunk_size": NARROW, "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        },
        (1,), sinks="no positions", mixes=True, dtype=torch.float32,
    ),
    "lfm2": Family(
        "lfm2", "convolutions between", {"layer_types": ["conv", "full_attention", "conv"]}, (1,), mixes=True
    ),
    "gpt_oss": Family(
        "gpt_oss", "learned sink logits, own windows", EXPERTS | {"sliding_window": NARROW, "layer_types": ALTERNATING},
        (1,), mixes=True, attention="eager", dtype=torch.float32,
    ),
    "gemma3n": Family(
        "gemma3n_text", "layers that share keys and values",
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": NARROW,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        (1, 3), mixes=True, dtype=torch.float32,
    ),
    "falcon_h1": Family(
        "falcon_h1", "a recurrence in every layer",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        mixes=True, recurs=True, dtype=torch.float32,
    ),
    "gpt2": Family("gpt2", "learned positions", sinks="true distance"),
    "opt": Family("opt", "learned positions", {"ffn_dim": 48, "word_embed_proj_dim": 32}, sinks="true distance"),
}
# fmt: on
LACKING = {"gpt2": ("intermediate_size", "num_key_value_heads", "head_dim")}
"""Sizes that a config does not have."""

REFUSED = {
    "diffllama": Family("diffllama", "calls the attention function 2 times in one forward"),
    "doge": Family("doge", "changes the mask"),
    "deepseek_v32": Family("deepseek_v32", "is a 'indexed_attention' layer", INDEXED),
    "bloom": Family("bloom", "does not use the attention interface", {"n_head": 4}, attention="eager"),
}
"""Families that cannot be retrofitted; their trait is what the error says."""


def base(name: str = "llama", dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    """The unmodified model of a family, the same at every call; weights large enough for sharp attention."""
    family = FAMILIES.get(name) or REFUSED[name]
    return copy.deepcopy(_base(family, dtype or family.dtype, tuple(sorted(options.items()))))


@functools.cache
def _base(family: Family, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    sizes = {key: value for key, value in SIZES.items() if key not in LACKING.get(family.model_type, ())}
    config = AutoConfig.for_model(family.model_type, **sizes | family.options | dict(options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # the experts' fast implementation has no float64
        kwargs = {"attn_implementation": family.attention, "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def retrofitted(
    name: str = "llama",
    dtype: torch.dtype | None = None,
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
def logits(model: torch.nn.Module, ids: Tensor, cuts: int | list[int] | None = None, cache: Any = None, **options: Any):
    """Logits of a text in one pass without cache, or, with ``cuts`` (sizes), piece by piece with one."""
    if cuts is None:
        return model(input_ids=ids, use_cache=False, **options).logits
    outs = []
    for piece in ids.split(cuts, dim=1):
        out = model(input_ids=piece, use_cache=True, **{CACHE: cache}, **options)
        cache = out[CACHE]
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
    """The families as a Markdown table, measured now: worst difference of logits over a text five times the window."""
    rows = ["| model type | special | layers with a memory | sinks | inside the window | cached - uncached |"]
    rows.append("|---|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        model, short, long = retrofitted(name), tokens(1, CAPACITY), tokens(1, 5 * CAPACITY)
        record = find_retrofitted(model)[1]
        exact = torch.equal(logits(base(name), short), logits(model, short))
        difference = (logits(model, long) - logits(model, long, 1)).abs().max()
        rows.append(
            f"| `{family.model_type}` | {family.trait} | {len(record.layers)} of {model.config.num_hidden_layers} "
            f"| {family.sinks} | {'bit-identical' if exact else 'different'} | {difference:.0e} |"
        )
    for family in REFUSED.values():
        rows.append(f"| `{family.model_type}` | {family.trait} | refused | | | |")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
