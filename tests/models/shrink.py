"""Shrinks any transformers configuration to a few layers of a few dozen channels, keeping every kind of layer.

The rules go by field name and are applied to a default instance of the configuration class, so a model type that
transformers adds tomorrow is shrunk by the same rules. What they cannot know stands in `overrides.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

Fields = dict[str, Any]

WINDOW = 8
HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
VOCAB = 128
PAD_TOKEN = 0
START_TOKEN = 1

_LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_blocks"
)
_HIDDEN_SIZES = (
    "hidden_size d_model n_embd embed_dim emb_dim hidden_dim embedding_dim embedding_size input_embedding_size"
)
_HEAD_COUNTS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads "
    "attention_num_heads"
)
_KV_HEAD_COUNTS = "num_key_value_heads swa_num_key_value_heads num_kv_heads"
_HEAD_DIMS = "head_dim v_head_dim swa_head_dim kv_channels d_kv d_head dim_head attention_head_size global_head_dim"
_MLP_SIZES = (
    "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff dim_ff n_inner ffn_hidden_size d_inner "
    "ffn_intermediate_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size feed_forward_size "
    "mlp_dim prefix_dense_intermediate_size"
)
_EXPERT_SIZES = (
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_intermediate_size"
)
_EXPERT_COUNTS = "num_experts n_routed_experts num_local_experts moe_num_experts"
_EXPERTS_PER_TOKEN = "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts"
_POSITION_COUNTS = "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"
_WINDOWS = (
    "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size local_attention "
    "keep_window_size attention_context_left"
)


def _named(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, int] = {
    **_named(_HIDDEN_SIZES, HIDDEN),
    **_named(_HEAD_COUNTS, HEADS),
    **_named(_HEAD_DIMS, HEAD_DIM),
    **_named(_MLP_SIZES, 96),
    **_named(_EXPERT_SIZES, 32),
    **_named(_EXPERT_COUNTS, 4),
    **_named(_EXPERTS_PER_TOKEN, 2),
    **_named(_POSITION_COUNTS, 128),
    **_named(_WINDOWS, WINDOW),
    **_named("n_group topk_group", 1),
    **_named("vocab_size vocab_size_per_layer_input pad_vocab_size unpadded_vocab_size", VOCAB),
    **_named("qk_rope_head_dim", 8),
    **_named("qk_nope_head_dim", 16),
    **_named("kv_lora_rank", 24),
    **_named("q_lora_rank o_lora_rank", 32),
    **_named("first_k_dense_replace num_dense_layers max_window_layers moe_layer_start_index", 1),
    **_named("hidden_size_per_layer_input laurel_rank", 16),
    **_named("mamba_d_state state_size ssm_state_size", 8),
    **_named("mamba_chunk_size chunk_size", 8),
    **_named("linear_key_head_dim linear_value_head_dim linear_head_dim", 16),
    **_named("linear_num_key_heads", 2),
    **_named("linear_num_value_heads", 4),
    **_named("index_head_dim", 16),
    **_named("num_codebooks", 2),
    **_named("query_pre_attn_scalar", HEAD_DIM),
    **_named("max_encoder_position_embeddings max_decoder_position_embeddings", 128),
    **_named("index_n_heads", 2),
    **_named("index_topk", WINDOW),
    **_named("num_mtp_layers num_nextn_predict_layers", 0),
    **_named("mamba_n_heads mamba_num_heads n_mamba_heads", 4),
    **_named("mamba_d_head mamba_head_dim", 32),
    **_named("mamba_d_ssm", 128),
    **_named("n_groups mamba_n_groups mamba_ngroups", 2),
}
# Special tokens that the shrunken vocabulary must hold; none ends the text.
_TOKENS: dict[str, int | None] = {
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": START_TOKEN,
    "eos_token_id": None,
    "decoder_start_token_id": START_TOKEN,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
_FIRST_SPECIAL_TOKEN = VOCAB - 16


def shrink(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a small configuration of the class of `config`, with `overrides` on top of the rules.

    An override named after a sub-configuration is a mapping that is applied to that sub-configuration, or a
    configuration that takes its place.
    """
    old = _fields(config)
    given = dict(overrides)
    new = _sizes(old) | _special_tokens(old) | _layers(old, config)
    for name, value in old.items():
        if isinstance(value, PreTrainedConfig):
            override = given.pop(name, {})
            new[name] = shrink(value, override) if isinstance(override, Mapping) else override
    return type(config)(**{**new, **given})


def _fields(config: PreTrainedConfig) -> Fields:
    # Attributes that differ by layer refuse to be read from the configuration, so read what is stored.
    stored = vars(config)
    names = (field.name for field in dataclasses.fields(config))
    return {name: stored.get(config.attribute_map.get(name, name), stored.get(name)) for name in names}


def _sizes(old: Fields) -> Fields:
    new = {name: size for name, size in _SIZES.items() if isinstance(old.get(name), int)}
    heads = next((old[name] for name in _HEAD_COUNTS.split() if isinstance(old.get(name), int)), None)
    for name in _KV_HEAD_COUNTS.split():
        kv_heads = old.get(name)
        if isinstance(kv_heads, int):
            # Multi-head, grouped and multi-query attention each stay what they are.
            new[name] = HEADS if kv_heads == heads else min(kv_heads, 2)
    if old.get("use_sliding_window") is False and "max_window_layers" in old:
        new["use_sliding_window"] = True
        new["sliding_window"] = WINDOW
    if "is_decoder" in old:
        new["is_decoder"] = True
    if "tie_word_embeddings" in old:
        # Tied random embeddings repeat the last token for ever, whatever attention sees.
        new["tie_word_embeddings"] = False
    return new


def _special_tokens(old: Fields) -> Fields:
    new: Fields = {name: token for name, token in _TOKENS.items() if name in old}
    others = [
        name
        for name, token in old.items()
        if name.endswith(("_token_id", "_token_index")) and name not in new and isinstance(token, int)
    ]
    return new | {name: _FIRST_SPECIAL_TOKEN + i for i, name in enumerate(sorted(others))}


def _layers(old: Fields, config: PreTrainedConfig) -> Fields:
    """Keep the first layer of every kind, and two layers at least."""
    count_names = [name for name in _LAYER_COUNTS.split() if isinstance(old.get(name), int)]
    num_layers = getattr(config, "num_hidden_layers", None) or (old[count_names[0]] if count_names else 0)
    if not num_layers:
        return {}
    per_layer = {
        name: list(value)
        for name, value in old.items()
        if isinstance(value, list | tuple) and len(value) == num_layers and num_layers > 2
    }
    kept = _first_of_each_kind(
        [per_layer[name] for name in per_layer if name.endswith(("types", "block_type"))], num_layers
    )
    return dict.fromkeys(count_names, len(kept)) | {name: [value[i] for i in kept] for name, value in per_layer.items()}


def _first_of_each_kind(kinds: list[list[str]], num_layers: int) -> list[int]:
    first: dict[tuple[str, ...], int] = {}
    for i in range(num_layers):
        first.setdefault(tuple(kind[i] for kind in kinds), i)
    kept = set(first.values())
    for i in range(min(2, num_layers)):
        if len(kept) < 2:
            kept.add(i)
    return sorted(kept)
