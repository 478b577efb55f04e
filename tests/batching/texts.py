"""Uneven prompts, two of which begin alike, and what plain transformers generates for each alone."""

import random
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvopt import CACHE_KEYWORD, Batcher, PagedCache, QuantizedPagedCache, Request
from tests.helpers import VOCAB, tiny_model

FORMATS = ("paged", "int8", "int4", "k8v4", "fp8_e4m3", "fp8_e5m2")
SPECS = ((5, 30), (50, 7), (17, 21), (3, 3), (70, 25), (33, 1), (16, 40), (64, 12))  # prompt, new tokens
BLOCK = 16  # tokens, also of formats that seal their blocks: texts are short
SYSTEM = 37  # tokens that prompts 4 and 7 begin with alike


def text(length: int, seed: int = 0) -> list[int]:
    """Draw one prompt."""
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, VOCAB) for _ in range(length)]


PROMPTS = [text(length, seed) for seed, (length, _) in enumerate(SPECS)]
PROMPTS[7][:SYSTEM] = PROMPTS[4][:SYSTEM]


@cache
def model_of(kind: str) -> PreTrainedModel:
    """One model for all tests, which leave it as it is."""
    return tiny_model(kind)


def alone(model: PreTrainedModel, prompt: list[int], **settings: Any) -> list[int]:
    """New tokens of plain `generate()` on one prompt, greedy unless told otherwise."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": 12, **settings}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return output[0, len(prompt) :].tolist()


@cache
def expected(kind: str, format: str) -> list[list[int]]:
    """Tokens of each prompt alone: native ones by eager attention and transformers' own cache, others with ours."""
    if format == "paged":
        model = tiny_model(kind, "eager")
        return [alone(model, p, max_new_tokens=n) for p, (_, n) in zip(PROMPTS, SPECS, strict=True)]
    outputs = []
    for prompt, (_, new) in zip(PROMPTS, SPECS, strict=True):
        cache = QuantizedPagedCache(model_of(kind).config, format=format, block_size=BLOCK)
        assert isinstance(cache, PagedCache)
        outputs.append(alone(model_of(kind), prompt, max_new_tokens=new, **{CACHE_KEYWORD: cache}))
    return outputs


def submit_all(batcher: Batcher) -> list[Request]:
    """Submit all prompts before the first step, so that every run makes the same steps."""
    with batcher._worker._changed:
        return [batcher.submit(p, max_new_tokens=n, do_sample=False) for p, (_, n) in zip(PROMPTS, SPECS, strict=True)]
