"""A decoder that somebody wrote on transformers' interfaces: one class, with the traits that attention blocks have.

Each trait is a function of the block or a flag, so that a test can combine them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ahn_layers.huggingface.decoder import CACHE

HIDDEN, VOCABULARY = 32, 64


class OwnConfig(PreTrainedConfig):
    """Any option."""

    model_type = "own_model_of_the_tests"

    def __init__(
        self, heads=4, kv_heads=2, head_dim=8, layers=2, traits=(), sliding_window=None, layer_types=None, **k
    ):
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, head_dim
        self.hidden_size, self.vocab_size, self.num_hidden_layers = HIDDEN, VOCABULARY, layers
        self.traits, self.sliding_window = list(traits), sliding_window
        if layer_types is not None:
            self.layer_types = layer_types
        self.max_position_embeddings = 256
        k.setdefault("tie_word_embeddings", False)
        super().__init__(**k)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float = 1.0, dropout: float = 0.0, softcap: float | None = None, slopes: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As beside every model of transformers, with what this one adds."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        distance = torch.arange(key.shape[2]) - torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        scores = scores + slopes[:, None, None] * distance
    if attention_mask is not None:
        scores = scores + attention_mask
    if "softmax one" in module.config.traits:
        weights = torch.cat((scores, torch.zeros_like(scores[..., :1])), dim=-1).softmax(dim=-1)[..., :-1]
    elif "sigmoid" in module.config.traits:
        weights = scores.sigmoid()
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotated(u: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding; positions ``(b, t)``."""
    size = u.shape[-1] // 2
    angles = positions[:, None, :, None] * 100.0 ** (-torch.arange(size) / size)
    cos, sin = angles.cos().to(u.dtype), angles.sin().to(u.dtype)
    a, b = (u[..., ::2], u[..., 1::2]) if interleaved else u.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


class OwnAttention(nn.Module):
    """Attention with the traits that the config asks for."""

    def __init__(self, config: OwnConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        if "no layer_idx" not in config.traits:
            self.layer_idx = layer_idx
        self.number = layer_idx
        self.traits = traits = set(config.traits)
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = 1 if "repeats keys" in traits else self.heads // self.kv_heads
        self.scaling, self.is_causal = self.size**-0.5, True
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        self.widths, bias = widths, "bias" in traits
        self.qkv = nn.Linear(HIDDEN, sum(widths), bias=bias)
        self.out = nn.Linear(self.heads * self.size, HIDDEN, bias=bias)
        self.q_norm = nn.RMSNorm(self.size) if "qk-norm" in traits else nn.Identity()
        self.k_norm = nn.RMSNorm(self.size) if "qk-norm" in traits else nn.Identity()
        self.slopes = nn.Parameter(torch.rand(self.heads), requires_grad=False) if "slopes" in traits else None
        self.prefix = nn.Parameter(torch.randn(2, 1, self.kv_heads, 2, self.size)) if "prefix" in traits else None
        self.gate = nn.Linear(HIDDEN, self.heads * self.size) if "gate" in traits else None
        self.temperature = nn.Parameter(torch.tensor(0.4)) if "learned scaling" in traits else None
        self.kept_function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        types = getattr(config, "layer_types", None)
        slides = types is not None and types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        traits, shape = self.traits, hidden_states.shape[:2]
        q, k, v = (
            u.unflatten(-1, (-1, self.size)).transpose(1, 2) for u in self.qkv(hidden_states).split(self.widths, -1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        interleaved = "interleaved" in traits
        past = 0 if past_key_values is None else past_key_values.get_seq_length(self.number)
        if not traits & {"no positions", "turned after the cache", "slopes", "bias mask"}:
            q, k = rotated(q, position_ids, interleaved), rotated(k, position_ids, interleaved)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.number)
        if "turned after the cache" in traits:
            q, k = rotated(q, position_ids), rotated(k, torch.arange(k.shape[2])[None])
        if "centred keys" in traits:
            k = k - k.mean(dim=2, keepdim=True)
        scaling = self.scaling
        if "scaling of the length" in traits:
            scaling = scaling * math.log(2 + k.shape[2])
        if "scaling of the cache's length" in traits:
            scaling = scaling * math.log(2 + past + shape[1])
        if self.temperature is not None:
            scaling = self.temperature
        if self.prefix is not None:
            k, v = (
                torch.cat((p.expand(shape[0], -1, -1, -1), u), dim=2) for p, u in zip(self.prefix, (k, v), strict=True)
            )
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (2, 0), value=True)
        if "repeats keys" in traits:
            k, v = (u.repeat_interleave(self.heads // self.kv_heads, dim=1) for u in (k, v))
        if "bias mask" in traits:
            bias = -torch.arange(k.shape[2]).flip(0).to(q.dtype) * torch.tensor(0.3)
            causal = torch.ones(shape[1], k.shape[2], dtype=torch.bool).tril(k.shape[2] - shape[1])
            attention_mask = bias.expand(1, 1, shape[1], -1).masked_fill(~causal, torch.finfo(q.dtype).min)
        if "own window" in traits:
            past_and_new = torch.arange(k.shape[2])
            distance = past_and_new[-shape[1] :, None] - past_and_new
            attention_mask = ((distance >= 0) & (distance < 5))[None, None]
        if "own window if long" in traits and k.shape[2] > 5:
            past_and_new = torch.arange(k.shape[2])
            distance = past_and_new[-shape[1] :, None] - past_and_new
            attention_mask = ((distance >= 0) & (distance < 5))[None, None]
        if "slices its mask" in traits and attention_mask is not None:
            attention_mask = attention_mask[:, :, :, : k.shape[2]]
        options = {"scaling": scaling, "dropout": 0.0, **kwargs}
        if "softcap" in traits:
            options["softcap"] = 2.0
        if self.slopes is not None:
            options["slopes"] = self.slopes
        if self.sliding_window is not None and "tells its window" in traits:
            options["sliding_window"] = self.sliding_window
        if "not causal" in traits:
            options["is_causal"], attention_mask = False, None
        name = self.config._attn_implementation
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        if "own function" in traits:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape[1] > 1, enable_gqa=True).transpose(
                1, 2
            )
        elif "kept function" in traits:
            y = self.kept_function(self, q, k, v, attention_mask, **options)[0]
        else:
            if "twice" in traits:
                q, other = q * 0.5, attend(self, q, k, v, attention_mask, **options)[0]
            y = attend(self, q, k, v, attention_mask, **options)[0]
            y = y - 0.3 * other if "twice" in traits else y
        y = y.reshape(*shape, -1)
        if self.gate is not None:
            y = y * self.gate(hidden_states).sigmoid()
        return self.out(y), None


class OwnCrossAttention(nn.Module):
    """Attention to what is not text."""

    def __init__(self, config: OwnConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.num_key_value_groups, self.shape = 1, (config.num_attention_heads, config.head_dim)
        self.q, self.kv = nn.Linear(HIDDEN, math.prod(self.shape)), nn.Linear(HIDDEN, 2 * math.prod(self.shape))
        self.seen = nn.Parameter(torch.randn(1, 3, HIDDEN))  # as many as the probe has tokens
        self.out = nn.Linear(math.prod(self.shape), HIDDEN)

    def forward(self, hidden_states: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        q = self.q(hidden_states).unflatten(-1, self.shape).transpose(1, 2)
        seen = self.seen.expand(len(hidden_states), -1, -1)
        k, v = (u.unflatten(-1, self.shape).transpose(1, 2) for u in self.kv(seen).chunk(2, dim=-1))
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        return self.out(attend(self, q, k, v, None, scaling=0.3, is_causal=False)[0].flatten(2))


class OwnLayer(nn.Module):
    """Attention and a feed-forward part, one after the other or both at once."""

    def __init__(self, config: OwnConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = OwnAttention(config, layer_idx)
        self.cross = OwnCrossAttention(config, layer_idx) if "cross" in config.traits else None
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 48), nn.SiLU(), nn.Linear(48, HIDDEN))
        self.norm, self.parallel = nn.LayerNorm(HIDDEN), "parallel" in config.traits

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y = self.norm(x)
        z = self.attention(y, **kwargs)[0]
        if self.cross is not None:
            z = z + self.cross(y)
        return x + z + self.mlp(y) if self.parallel else x + z + self.mlp(self.norm(x + z))


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(OwnLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None, **kwargs
    ) -> BaseModelOutputWithPast:
        cache = kwargs.pop("past_key_values", kwargs.pop("cache", None))
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is not False and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1]) + past)[None]
        asked = {"config": self.config, "inputs_embeds": x, "attention_mask": attention_mask, CACHE: cache}
        masks = {"full_attention": create_causal_mask(**asked, position_ids=position_ids)}
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**asked, position_ids=position_ids)
        types = kinds or ["full_attention"] * len(self.layers)
        shared = [self.layers[0]] * len(self.layers) if "one layer again" in self.config.traits else self.layers
        if "biased by the model" in self.config.traits:
            size = masks["full_attention"].shape[-1] if masks["full_attention"] is not None else past + x.shape[1]
            bias = -0.3 * torch.arange(size).flip(0).to(x.dtype)
            seen = torch.arange(size)[None] <= torch.arange(size - x.shape[1], size)[:, None]
            masks["full_attention"] = torch.where(seen, bias, torch.finfo(x.dtype).min)[None, None]
        for layer, kind in zip(shared, types, strict=True):
            x = layer(x, attention_mask=masks[kind], position_ids=position_ids, past_key_values=cache)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})


class OwnModelForCausalLM(OwnPreTrainedModel, GenerationMixin):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep if logits_to_keep else 0 :])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: out.get(CACHE)})


def own_model(*traits: str, **options: Any) -> OwnModelForCausalLM:
    """A random model in float64."""
    torch.manual_seed(0)
    attention = options.pop("attention", "sdpa")
    config = OwnConfig(traits=traits, **options)
    model = OwnModelForCausalLM._from_config(config, attn_implementation=attention).double().eval()
    with torch.no_grad():
        for u in model.parameters():
            u.copy_(torch.randn_like(u) * 0.3 if u.ndim > 1 else u + 0.1 * torch.randn_like(u))
    return model
