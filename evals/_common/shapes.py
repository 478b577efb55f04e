"""Random Llama models by name, for sizes at which no trained model is needed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
        },
        # The model of the CPU speed bars: small enough for two cores, with the KV traffic of a real one.
        "bench": {
            "num_hidden_layers": 8,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 4096,
        },
    }
)


def random_model(shape: str, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Build the named shape, with `changes` to its config, in float32 on the CPU with weights drawn from `seed`."""
    config = LlamaConfig(
        **{**SHAPES[shape], **changes},
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
