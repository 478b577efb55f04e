"""What the shrinking rules cannot know about a model type, and the seeds of the tiny models."""

from typing import Any

_DOTS3 = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "head_dim": 24,
    "sliding_window": 8,
    "shared_experts_intermediate_size": 32,
}
# The last two layers read the keys and values of the first two.
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "intermediate_size": 96,
}
_GEMMA4_UNIFIED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
}
_GEMMA4 = _GEMMA4_UNIFIED | {"hidden_size_per_layer_input": 16}
# Short enough for a tiny text to pass both.
_INKLING2 = {"rel_extent": 12, "log_scaling_n_floor": 8}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
# Low enough to bend the scores of a tiny model.
_SOFTCAP = {"attn_logit_softcapping": 2.0}
_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        **_SLIDING,
    },
    "codegen": {"rotary_dim": 8},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    # Three passes through the layers in the middle, each with keys and values of its own.
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "n_recurrent_loops": 3,
        "initializer_range": 1.0,  # the start value of the scales, which the draw moves by a tenth
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        "text_config": _DOTS3,
    },
    "dots3_note_text": _DOTS3,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **_SLIDING},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma2": _SOFTCAP,
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4_UNIFIED},
    "gemma4_unified_text": _GEMMA4_UNIFIED,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 32,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_text": _INKLING2,
    "inkling2_loop_text": {
        **_INKLING2,
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 3,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2, "head_dim": 8},
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "mellum": _SLIDING,
    "ministral": {"head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "rotary_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "shared_intermediate_size": 32,
    },
    "LEDForConditionalGeneration": {"attention_window": 8},
    "LlavaForConditionalGeneration": {"vision_config": {"image_size": 16, "patch_size": 8}},
    "Qwen2VLForConditionalGeneration": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        "vision_config": {"hidden_size": 64, "embed_dim": 64, "patch_size": 4},
    },
    "MllamaForConditionalGeneration": {
        "vision_config": {
            "image_size": 16,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 128,
        },
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    },
    "T5GemmaForConditionalGeneration": {"encoder": _SOFTCAP, "decoder": _SOFTCAP},
    "vaultgemma": _SOFTCAP,
    "WhisperForConditionalGeneration": {"max_source_positions": 16, "num_mel_bins": 8},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen2": _SLIDING,
    "qwen2_moe": _SLIDING,
    "qwen3": _SLIDING,
    "smollm3": {**_SLIDING, "use_sliding_window": True, "sliding_window": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 16),
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "roc_bert": {"shape_vocab_size": 32, "pronunciation_vocab_size": 32},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "num_experts_per_tok": 1,
        "sliding_window": 8,
        "router_hidden_size": 16,
    },
}

# The types of the parts of a configuration that has no default by itself.
_MUSICGEN = {"text_encoder": "t5", "audio_encoder": "encodec"}
PARTS: dict[str, dict[str, str]] = {
    "musicgen": {**_MUSICGEN, "decoder": "musicgen_decoder"},
    "musicgen_melody": {**_MUSICGEN, "decoder": "musicgen_melody_decoder"},
}

# Added to the seed of a model whose first draw left two tokens too close, or repeated one token for ever.
SALTS: dict[str, int] = {
    "bert": 3,
    "codegen": 1,
    "cohere": 3,
    "cohere2_moe": 6,
    "cwm": 1,
    "data2vec-text": 1,
    "deepseek_v3": 1,
    "flex_olmo": 2,
    "flint": 1,
    "gemma4_unified": 1,
    "gpt-sw3": 1,
    "inkling_text": 37,
    "moss_transcribe_diarize": 1,
    "phimoe": 1,
    "qwen2": 1,
    "qwen3": 1,
    "rembert": 1,
    "roberta": 2,
    "roc_bert": 2,
    "xlm-roberta-xl": 1,
    "zamba2": 1,
    "BartForConditionalGeneration": 6,
    "BlenderbotSmallForConditionalGeneration": 25,
    "LEDForConditionalGeneration": 7,
    "LongT5ForConditionalGeneration": 2,
    "MarianMTModel": 10,
    "MvpForConditionalGeneration": 2,
    "PLBartForConditionalGeneration": 10,
    "ProphetNetForConditionalGeneration": 6,
    "T5ForConditionalGeneration": 1,
}
