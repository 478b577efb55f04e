"""The timed work: one prefill, then decode steps of one token, through `model.forward`."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from evals._common.models import Subject
from evals._common.sides import Side
from hf_kvopt import CACHE_KEYWORD


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Number of tokens in the cache before the first step, and of the steps that follow."""

    context: int
    batch: int
    steps: int
    new_tokens: int

    @property
    def max_len(self) -> int:
        """Most tokens that a row of the cache holds."""
        return self.context + max(self.steps, self.new_tokens)

    def make_cache(self, side: Side, subject: Subject) -> Cache:
        """Make the side's empty cache with room for this work."""
        return side.make_cache(subject.model, self.max_len)


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,  # [batch, context]
) -> Tensor:  # [batch, vocab]: logits of the last token
    """Fill an empty cache in one forward, with the logits of the last token only, as generate() does."""
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    only_last = {"logits_to_keep": 1} if accepts else {}
    return model(input_ids=ids, **{CACHE_KEYWORD: cache}, use_cache=True, **only_last).logits[:, -1]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,  # [batch, steps]: the tokens that are fed, regardless of the model's choices
) -> list[Tensor]:  # [steps] of [batch, vocab]
    """Feed one token of each row a step; the cache grows by one token a step."""
    logits = []
    for step in range(ids.shape[1]):
        out = model(input_ids=ids[:, step : step + 1], **{CACHE_KEYWORD: cache}, use_cache=True)
        logits.append(out.logits[:, -1])
    return logits


def generate(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,  # [batch, context]
    new_tokens: int,
) -> Tensor:  # [batch, context + new_tokens]
    """Run a whole greedy generate() to its full length."""
    return model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_KEYWORD: cache},
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
