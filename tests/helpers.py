"""Tiny seeded models in float32 of three kinds, prompts, and the tokens that transformers generates by itself.

    full     Llama, grouped queries                  sliding  Mistral, each layer behind a window shorter than a prompt
    mixed    Gemma 3, sliding and full layers

Weights are drawn wide, so that margins far above float32 noise decide the next token.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache
from hf_kvopt.cli.watch import IdleGuard, work_of

VOCAB, WINDOW, NEW_TOKENS = 97, 20, 12
KINDS = ("full", "sliding", "mixed")
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.25,
}


def tiny_config(kind: str) -> PreTrainedConfig:
    """Build the config of a kind."""
    if kind == "full":
        return LlamaConfig(**_SHAPE, num_hidden_layers=2)
    if kind == "sliding":
        return MistralConfig(**_SHAPE, num_hidden_layers=2, sliding_window=WINDOW)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(**_SHAPE, num_hidden_layers=3, sliding_window=WINDOW, layer_types=types)


def tiny_model(kind: str = "full", attention: str = ATTENTION_NAME, seed: int = 0) -> PreTrainedModel:
    """Build the model of a kind: a kind and a seed always give the same weights."""
    config = tiny_config(kind)
    classes = {"full": LlamaForCausalLM, "sliding": MistralForCausalLM, "mixed": Gemma3ForCausalLM}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classes[kind]._from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw one row for each length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    columns = torch.arange(max(lengths))
    mask = (columns >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any = None, **kwargs: Any) -> Tensor:
    """Generate greedily by default, and return prompt and new tokens."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, CACHE_KEYWORD: cache, **kwargs}
    return model.generate(**inputs, **options)


@cache
def eager_tokens(kind: str, *lengths: int, **options: Any) -> Tensor:
    """Return the tokens of eager attention and transformers' own cache for `prompt(*lengths)`."""
    model = tiny_model(kind, "eager")
    return generate(model, prompt(*lengths), DynamicCache(config=model.config), **options)


def eager_continuation(kind: str, text: Tensor, **options: Any) -> Tensor:
    """Return the tokens of eager attention after `text` [batch, length] without padding, from an empty cache."""
    model = tiny_model(kind, "eager")
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return generate(model, inputs, DynamicCache(config=model.config), **options)


def unpadded(text: Tensor) -> dict[str, Tensor]:
    """Return inputs for `text` [batch, length] without padding."""
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


def states(batch: int, num_tokens: int, seed: int = 0, num_heads: int = 2, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Draw keys and values [batch, num_heads, num_tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_heads, num_tokens, dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def assert_usable(cache: PagedCache, kind: str = "full", seed: int = 0) -> None:
    """Check that no block is lost, and that the cache, once reset, generates the right tokens."""
    cache.check_integrity()
    cache.reset()
    assert cache.stats().used_blocks == 0
    assert torch.equal(generate(tiny_model(kind, seed=seed), prompt(9, 6), cache), eager_tokens(kind, 9, 6))
    cache.check_integrity()


def assert_in_a_forked_child(check: Callable[[], bool]) -> None:
    """Run `check` in a forked child, which is killed where it does no work: it may wait for threads that it lacks."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # torch's own operations would wait for ever
            code = 0 if check() else 2
        finally:
            os._exit(code)
    guard = IdleGuard(60)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
        if guard.is_idle(work_of(child)):
            os.kill(child, signal.SIGKILL)
    assert status == 0


def join_while_working(threads: Sequence[threading.Thread], work: Callable[[], int]) -> None:
    """Wait for threads for as long as what `work` counts grows."""
    guard = IdleGuard(60)
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
        assert not guard.is_idle(work()), f"threads hang: got {work()} steps"
