"""Models of other kinds: caps, sinks of their own, windows beside full layers, latent attention, rotary parts."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Qwen3Config,
)

from hf_kvopt import CACHE_KEYWORD, SinkRecent, enable
from tests.eviction.dropping import DroppingLayer
from tests.helpers import prompt, unpadded

POLICY = SinkRecent(4, 32)
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.25,
    "pad_token_id": 0,
}
_MIXED = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "caps on scores": Gemma2Config(**_SHAPE, **_MIXED, query_pre_attn_scalar=8),
    "windows": Gemma3TextConfig(**_SHAPE, **_MIXED),
    "sinks of its own": GptOssConfig(**_SHAPE, **_MIXED, num_local_experts=2, num_experts_per_tok=1),
    "normed heads": Qwen3Config(**_SHAPE),
    "part of a head rotates": GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.25, rotary_pct=0.5, pad_token_id=0,
    ),
    "learned positions": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.25, pad_token_id=0
    ),
    "latent attention": DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, initializer_range=0.25, pad_token_id=0,
    ),
}  # fmt: skip


def dropping(config):
    """transformers' cache for `config`, whose full layers drop tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [layer if layer.is_sliding else DroppingLayer(POLICY) for layer in cache.layers]
    return cache


def make(config, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_plain_tensors_that_are_cut(name):
    config, inputs = CONFIGS[name], prompt(60, 41)
    options = {"max_new_tokens": 50, "do_sample": False, "return_dict_in_generate": True}
    model = enable(make(config, "eager"), policy=POLICY)
    out = model.generate(**inputs, **options)
    assert out.get(CACHE_KEYWORD).stats().evicted > 0
    out.get(CACHE_KEYWORD).check_integrity()
    plain = make(config, "eager")
    for row, length in enumerate((60, 41)):
        own = unpadded(inputs["input_ids"][row : row + 1, 60 - length :])
        want = plain.generate(**own, **options, **{CACHE_KEYWORD: dropping(plain.config)})
        assert torch.equal(out.sequences[row, 60 - length :], want.sequences[0])
