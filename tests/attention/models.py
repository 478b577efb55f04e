"""Tiny models that share weights between attentions, prompts, and what "equal" means."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_kvopt import ATTENTION_NAME, PagedCache
from tests.models.cases import Case, covered_cases
from tests.models.tiny import build

DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "llama4_text", "gpt2")
VOCAB = 100


@cache
def case_named(name: str) -> Case:
    return next(case for case in covered_cases() if case.name == name)


@cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same tiny model with eager attention and with ours; tests leave both as they are."""
    case = case_named(name)
    return build(case, "eager"), build(case, ATTENTION_NAME)


def prompts(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def caches(model: PreTrainedModel) -> dict[str, Any]:
    """A cache of each kind, dense and paged."""
    config = model.config.get_text_config(decoder=True)
    return {"dense": DynamicCache(config=config), "paged": PagedCache(config)}


def assert_equal(got: Tensor, want: Tensor, where: Tensor | None = None) -> None:
    """Logits [batch, length, vocab] agree to float32 noise of their size, at the positions `where` [batch, length]."""
    got, want = got.detach(), want.detach()
    if where is not None:
        got, want = got[where.bool()], want[where.bool()]
    assert got.shape == want.shape
    assert got.isfinite().all()
    delta = (got - want).abs().max().item()
    assert delta <= 1e-5 * max(1.0, want.abs().max().item()), f"logits differ by {delta:.1e}"
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def from_config(name: str, attention: str) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_config`, which asks no model whether it knows the attention."""
    model = AutoModelForCausalLM.from_config(build(case_named(name)).config, attn_implementation=attention)
    model.load_state_dict(build(case_named(name)).state_dict())
    return model.eval()
