"""Rotary scaling by length: equal tokens while it has no effect, a refusal before the first token where it may."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_kvopt import CACHE_KEYWORD, PagedCache, UnsupportedModel, compat, speculative
from tests.helpers import VOCAB
from tests.speculation.drafters import Forest, Oracle

ORIGINAL = 48
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": ORIGINAL, "short_mscale": 1.0, "long_mscale": 1.2,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MIXED = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


def phi(kind: type = Phi3ForCausalLM, config: type = Phi3Config, **more: Any) -> PreTrainedModel:
    options = {"max_position_embeddings": 4 * ORIGINAL, "original_max_position_embeddings": ORIGINAL, **more}
    return seeded(kind, config(**_SHAPE, rope_parameters=LONG, **options))


def llama(rope: dict, longest: int = ORIGINAL) -> PreTrainedModel:
    return seeded(LlamaForCausalLM, LlamaConfig(**_SHAPE, max_position_embeddings=longest, rope_parameters=rope))


def gemma() -> PreTrainedModel:
    config = Gemma3TextConfig(
        **_SHAPE, head_dim=8, max_position_embeddings=ORIGINAL, rope_parameters=MIXED, sliding_window=20,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return seeded(Gemma3ForCausalLM, config)


def seeded(kind: type, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
    model.generation_config.pad_token_id = 0
    return model


BY_LENGTH = {
    "longrope of Phi-3": phi,
    "longrope of Phi-MoE": lambda: phi(PhimoeForCausalLM, PhimoeConfig, num_local_experts=2),
    "dynamic": lambda: llama(DYNAMIC),
    "dynamic in one kind of layer": gemma,
}


def texts(*lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def plain(model: PreTrainedModel, inputs: dict[str, Tensor], new: int, **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)


def drafted(model: PreTrainedModel, inputs: dict[str, Tensor], new: int, wanted: Tensor, **options: Any) -> Tensor:
    is_one = len(wanted) == 1
    drafter: Any = Forest(wanted, wrong_at=(wanted.shape[1] - 6,)) if is_one else Oracle(wanted)
    spec = speculative(drafter, gamma=4, num_nodes=12 if is_one else None, fallback=False)
    return plain(model, inputs, new, custom_generate=spec, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("lengths", [(20,), (20, 9, 14)], ids=["batch 1, trees", "batch 3"])
@pytest.mark.parametrize("make", BY_LENGTH.values(), ids=BY_LENGTH)
def test_texts_up_to_the_original_length_give_the_tokens_of_plain_decoding(make: Any, lengths: Any) -> None:
    model, inputs, new = make(), texts(*lengths), ORIGINAL + 1 - max(lengths)
    wanted = plain(model, inputs, new)
    assert torch.equal(drafted(model, inputs, new, wanted), wanted)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("length", "new"), [(110, 20), (40, 20), (20, ORIGINAL - 18)], ids=["beyond", "across", "one too many"]
)
@pytest.mark.parametrize("make", BY_LENGTH.values(), ids=BY_LENGTH)
def test_texts_that_may_grow_longer_are_refused_before_the_first_token(make: Any, length: int, new: int) -> None:
    model, inputs = make(), texts(length)
    cache = PagedCache(config=model.config)
    with pytest.raises(UnsupportedModel, match=f"beyond {ORIGINAL} tokens"):
        plain(model, inputs, new, custom_generate=speculative("prompt_lookup"), **{CACHE_KEYWORD: cache})
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("make", BY_LENGTH.values(), ids=BY_LENGTH)
def test_what_a_cache_holds_counts(make: Any) -> None:
    model, inputs = make(), texts(30)
    cache = PagedCache(config=model.config)
    first = plain(model, inputs, 10, **{CACHE_KEYWORD: cache})
    turn = {"input_ids": first[:, -1:].repeat(1, 3), "attention_mask": torch.ones(1, first.shape[1] + 2).long()}
    with pytest.raises(UnsupportedModel, match="one that may grow to 49;"):
        plain(model, turn, 8, custom_generate=speculative("prompt_lookup"), **{CACHE_KEYWORD: cache})
    assert cache.get_seq_length() == 39
    got = plain(model, turn, 7, custom_generate=speculative("lookahead", fallback=False), **{CACHE_KEYWORD: cache})
    assert got.shape[1] == 10


def test_the_message_says_how_many_tokens_can_be_generated() -> None:
    model, inputs = phi(), texts(40)
    with pytest.raises(UnsupportedModel, match="generate at most 9 new tokens"):
        plain(model, inputs, 20, custom_generate=speculative("prompt_lookup"))
    wanted = plain(model, inputs, 9)
    assert torch.equal(drafted(model, inputs, 9, wanted), wanted)


def test_a_model_that_was_scaled_by_a_longer_text_gives_the_tokens_of_plain_decoding() -> None:
    model = llama(DYNAMIC)
    plain(model, texts(110), 5)
    wanted = plain(llama(DYNAMIC), texts(20, 9), 20)
    assert torch.equal(drafted(model, texts(20, 9), 20, wanted), wanted)


STEADY = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", STEADY.values(), ids=STEADY)
def test_other_scalings_do_not_look_at_the_length(rope: dict) -> None:
    model, inputs = llama(rope, 4 * ORIGINAL), texts(40, 25)
    wanted = plain(model, inputs, 40)
    assert torch.equal(drafted(model, inputs, 40, wanted), wanted)


def test_a_past_that_the_model_drops_is_noticed() -> None:
    # Phi-3 recomputes texts that pass the original length, for any rotation: into a cache of its own.
    model = phi()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with pytest.raises(UnsupportedModel, match="got one of 0 columns where 110 were expected"):
        plain(model, texts(110), 5, custom_generate=speculative("prompt_lookup"))


FORMS = {
    "none": ({}, {}),
    "default": ({"rope_parameters": {"rope_type": "default"}}, {}),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}}, {}),
    "as of old": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"dynamic": 100}),
    "Phi-3's first name": ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 30}, {"su": 30}),
    "the least of two": (
        {"rope_parameters": {**LONG, "original_max_position_embeddings": 40}, "original_max_position_embeddings": 30},
        {"longrope": 30},
    ),
    "by kind of layer": ({"rope_parameters": MIXED}, {"dynamic": 100}),
    "without a length": ({"rope_scaling": {"rope_type": "longrope"}}, {"longrope": 0}),
}


@pytest.mark.parametrize(("fields", "found"), FORMS.values(), ids=FORMS)
def test_every_form_of_a_config_is_read(fields: dict, found: dict[str, int]) -> None:
    config: Any = SimpleNamespace(max_position_embeddings=100, **fields)
    assert compat.length_dependent_rope(config) == found
