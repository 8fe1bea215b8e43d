"""A tiny random model of any type that transformers can build, from the defaults of its config.

Sizes are shrunk by the names that configs give them; lists with an entry for each layer keep entries of every kind.
Types whose sizes depend on each other in a way that their names do not tell are in ``EXTRA``.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .special import EXTRA

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
HIDDEN = HEADS * HEAD_DIM
VOCABULARY = 128
FIRST_SPECIAL = 100
"""Token ids from here on stand for images, video and audio, or mark their ends."""
NARROW = 16
"""The models' own sliding windows."""

_RULES: list[tuple[str, int]] = [
    (r"(decoder_)?vocab_size(_per_layer_input)?|unpadded_vocab_size|(audio|codebook|mel)_vocab_size", VOCABULARY),
    (r"vocab_offset", FIRST_SPECIAL),
    (r"hidden_size_per_layer_input|laurel_rank|.*_lora_rank|.*_rank|d_rel", 16),
    (r".*intermediate.*(size|dim).*|.*ffn_(hidden_)?(size|dim)|d_ff|dff|dim_ff|mlp_dim|d_inner|share_expert_dim", 96),
    (r"feed_forward_size|downsample_hidden_size", 96),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"rotary_dim|rope_head_dim", 8),
    (r"(.*_)?head_dim|d_head|dim_head|attention_head_size|kv_channels|d_kv|query_pre_attn_scalar", HEAD_DIM),
    (r"mamba_headdim", 2 * HEAD_DIM),
    (r"num_key_value_heads|num_kv_heads|.*_key_value_heads|num_query_groups|linear_num_key_heads", KV_HEADS),
    (r"(.*_)?(num_)?attention_heads|n_heads?|num_heads|.*_num_heads|.*_n_heads|linear_num_value_heads", HEADS),
    (r"(encoder|decoder|dit|talker)?_?hidden_size(_global)?|d_model|n_embd|dim_model(_base)?|.*hidden_dim", HIDDEN),
    (r".*_hidden_size|embed(ding)?_dim|emb_dim|embed_dim|embedding_size|.*_embedding_size|word_embed_proj_dim", HIDDEN),
    (r"out_hidden_size|output_dim|projection_dim|.*_embed_dim|adapter_(in|out)_dim|adapter_input_size", HIDDEN),
    (r"lru_width|mamba_d_ssm|pooler_output_size|vision_output_dim|projector_(in|out)put_dim|moe_latent_size", HIDDEN),
    (r"num_hidden_layers|n_layers?|layers|num_layers|depth|num_blocks|(encoder|decoder)_layers", 2),
    (r".*num_layers_per_stack", 2),
    (r"num_(encoder|decoder)_layers|n_recurrent_layers|conf_num_hidden_layers|decoder_num_layers", 2),
    (r"num_local_experts|(moe_)?num_experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|.*experts_per_token", 2),
    (r"n_group|topk_group|num_expert_groups?|num_limited_groups?", 1),
    (r"sliding_window(_size)?|attention_window_size|local_attention|keep_window_size|attention_chunk_size", NARROW),
    (r"index_topk", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions", 512),
    (r"original_max_position_embeddings|max_source_positions|context_length", 512),
    (r"(.*_)?(image|crop|max_img|input)_size|resolution", 32),
    (r"(.*_)?patch_size", 8),
    (r".*chunk_size", 8),
    (r"(mamba_d_|ssm_)?state(_size)?|mamba_n_state", 16),
    (r"num_mel_bins|n_mel_bins|feature_size|input_feat_size", 16),
    (r".*conv_channels|.*out_channel|num_filters|.*_out_channels", 16),
    (r"base_channels|latent_channels", 32),
    (r"num_query_tokens|.*n_latents|.*num_latents|latent_query_num|mm_tokens_per_image|image_seq_length", 4),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), size) for pattern, size in _RULES]
_TEXT = re.compile(r"(.*/)?(text_config|decoder|thinker_config|llm_config|vlm_config)?")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of this type with few, small layers of every kind."""
    extra = EXTRA.get(model_type, {})
    cls = CONFIG_MAPPING[model_type]
    plain = cls(**{k: v for k, v in extra.items() if k in ("is_encoder_decoder",)})
    changes = _shrunk(plain, "")
    changes = _merged(changes, extra)
    return cls(**changes)


def _merged(changes: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """``changes`` with those of ``extra`` on top, also in parts."""
    merged = dict(changes)
    for key, value in extra.items():
        if value is ...:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _shrunk(config: PreTrainedConfig, path: str) -> dict[str, Any]:
    """What to pass to the config's class."""
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    for name, cls in type(config).sub_configs.items():
        if values.get(name, 0) is None and cls is not AutoConfig:
            values[name] = cls()
    depth = next((v for k, v in values.items() if k in ("num_hidden_layers", "n_layer") and isinstance(v, int)), None)
    is_text = bool(_TEXT.fullmatch(path)) and "vocab_size" in values
    places = _layers_of_every_kind(values, depth, 3 if is_text else 2) if depth else []
    latent = "qk_rope_head_dim" in values
    made: dict[str, Any] = {}
    special = iter(range(FIRST_SPECIAL, VOCABULARY))
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            made[name] = _shrunk(value, f"{path}/{name}".lstrip("/"))
            if name not in ("encoder", "decoder"):
                pass
            made[name].setdefault("model_type", value.model_type)
        elif name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            made[name] = [1]
        elif name == "rope_parameters" and isinstance(value, dict) and _rotates_in_3d(value, config):
            size = 8 if latent else HEAD_DIM
            sections = _sections(int(size * value.get("partial_rotary_factor", 1)) // 2)
            made[name] = value | {"mrope_section": sections} if "rope_theta" in value else value
        elif isinstance(value, (list, tuple)) and depth and len(value) == depth and depth > 1:
            made[name] = type(value)(value[i] for i in places) if not name.endswith("_idxs") else value
            if name.endswith("intermediate_size"):
                made[name] = [96] * len(places)
        elif name == "head_dim" and (latent or (value is None and is_text)):
            made[name] = 8 if latent else HEAD_DIM
        elif name == "num_key_value_heads" and latent:
            made[name] = HEADS
        elif name in ("mamba_d_head", "mamba_d_ssm"):
            made[name] = 2 * HIDDEN // (1 if name == "mamba_d_ssm" else HEADS)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif re.fullmatch(r"(.*_)?(token_id|token_index|_id|token)|image_patch_id|im_.*_id", name):
            if name in ("pad_token_id", "bos_token_id"):
                made[name] = int(name == "bos_token_id")
            elif name in ("eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id"):
                made[name] = 2
            else:
                made[name] = next(special)
        elif depth and name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            made[name] = len(places)
        else:
            for pattern, size in _COMPILED:
                if pattern.fullmatch(name):
                    made[name] = min(value, size)
                    break
    aliases = {own: alias for alias, own in type(config).attribute_map.items() if alias in names_of(type(config))}
    return {aliases.get(name, name): value for name, value in made.items()}


def _rotates_in_3d(parameters: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether the config or the model's code knows sections of channels for time, height and width."""
    if "mrope_section" in parameters:
        return True
    path = Path(sys.modules[type(config).__module__].__file__ or "")
    code = path.with_name(path.name.replace("configuration", "modeling"))
    return code.exists() and "mrope_section" in code.read_text()


def _sections(size: int) -> list[int]:
    """Channels for time, height and width."""
    return [size - 2 * (3 * size // 8), 3 * size // 8, 3 * size // 8]


def names_of(cls: type) -> set[str]:
    """The fields of a config class."""
    return set(getattr(cls, "__dataclass_fields__", ()))


def _layers_of_every_kind(values: dict[str, Any], depth: int, count: int) -> list[int]:
    """Indices of layers, in order, among which every kind of layer occurs."""
    listed = [v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 1
              and all(isinstance(u, (str, int)) for u in v) and not k.endswith("_idxs")]  # fmt: skip
    kinds = [tuple(v[i] for v in listed) for i in range(depth)]
    chosen = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[: max(count, 5)]
    for i in range(depth):
        if len(chosen) >= count:
            break
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def initialise(model: torch.nn.Module) -> None:
    """Weights large enough for sharp attention, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
