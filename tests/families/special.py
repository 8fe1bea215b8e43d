"""What single types need beside shrunk sizes."""

from typing import Any

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
SHARING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
MAMBA = {"mamba_d_head": 32}

PINPOINTS = {"image_grid_pinpoints": [[32, 32], [32, 64], [64, 32]]}
DECODER = {"is_decoder": True}
ROTATION = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
COMPASS = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": ROTATION, "full_attention": ROTATION},
}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER,
    "camembert": DECODER,
    "data2vec-text": DECODER,
    "electra": DECODER,
    "ernie": DECODER,
    "megatron-bert": DECODER,
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER,
    "roformer": DECODER,
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "bamba": MAMBA | {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "cohere_compass_text": COMPASS,
    "cohere_compass": {"text_config": COMPASS},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64},
    },
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "glmasr": {"audio_config": {"intermediate_size": 256}},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "bailing_hybrid": {"num_experts_per_tok": 2, "num_experts_per_token": 2},
    "kimi_linear": {"num_experts_per_tok": 2, "num_experts_per_token": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8},
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "layers_block_type": HYBRID,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "deepseek_v2": EXPERTS,
    "nemotron": {"num_key_value_heads": 2},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "zamba": {
        "layers_block_type": HYBRID,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "llava_next": PINPOINTS,
    "llava_next_video": PINPOINTS,
    "llava_onevision": PINPOINTS,
    "vipllava": {"vision_feature_layers": [-2, -1], "vision_feature_layer": [-2, -1]},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "blip-2": {"image_token_index": 105},
    "instructblip": {"image_token_index": 105},
    "instructblipvideo": {"video_token_index": 105},
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 110, "vision_end_token_id": 111},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110, "vision_end_token_id": 111},
    "qwen2_5_omni": {"thinker_config": {"vision_start_token_id": 110}},
    "dots1": EXPERTS,
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": SHARING,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "attention_layers": ...},
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48)},
    "xmod": DECODER | {"default_language": "en_XX"},
}

ALL_ALIKE = {"paligemma"}
"""Types whose prompts are one block: places of images are not told from text."""
