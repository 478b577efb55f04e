"""Teacher-forced reading through caches, in chunks: every token attends to what the cache returns.

One forward over a whole text would show no loss for a quantized cache that returns the states it was just given. All
sides read the same chunk before any reads the next, so that the baseline's distribution is kept for one chunk only, for
any vocabulary size.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel

from evals._common.memory import KVBytes, kv_bytes
from hf_kvopt import CACHE_KEYWORD


class Reader(Protocol):
    """Way to read a text: a `Side`, or what an eval has in its place."""

    def make_cache(self, model: PreTrainedModel, max_len: int) -> Cache:
        """Make an empty cache that can hold `max_len` tokens of each row."""
        ...

    def attend(self, model: PreTrainedModel) -> PreTrainedModel:
        """Switch the model to the attention to read with, and return it."""
        ...


class Scores(NamedTuple):
    """Figures for each token of some segments, as read by one side."""

    nll: Tensor  # [num_segments, num_tokens] nats
    kl: Tensor  # [num_segments, num_tokens] nats, of the baseline's next-token distribution from this side's
    same_top1: Tensor  # [num_segments, num_tokens] bool: both would choose the same token
    is_right: Tensor  # [num_segments, num_tokens] bool: this side would choose the token that follows


class Reading(NamedTuple):
    """Result of one side for a batch of segments."""

    scores: Scores
    held: KVBytes  # by the cache at the end


@torch.inference_mode()
def read_segments(
    model: PreTrainedModel,
    sides: Sequence[Reader],  # the first is the baseline
    ids: Tensor,  # [batch, context]
    chunk: int,  # tokens fed at once
    prefill: int = 0,  # tokens fed before them, at once or in pieces of a side's `prefill_size`, and not scored
) -> list[Reading]:
    """Read a batch of segments through an empty cache of each side."""
    context = ids.shape[1]
    caches = [side.make_cache(model, context) for side in sides]
    scores: list[list[Scores]] = [[] for _ in sides]
    if prefill:
        for side, cache in zip(sides, caches, strict=True):
            for part in ids[:, :prefill].split(getattr(side, "prefill_size", None) or prefill, dim=1):
                _feed(side.attend(model), cache, part)
    # The last token is only predicted: feeding it would give unused logits.
    for begin in range(prefill, context - 1, chunk):
        end = min(begin + chunk, context - 1)
        targets = ids[:, begin + 1 : end + 1].to(model.device)
        baseline: Tensor | None = None
        for side, cache, own in zip(sides, caches, scores, strict=True):
            logits = _feed(side.attend(model), cache, ids[:, begin:end])
            log_probs = F.log_softmax(logits.float(), dim=-1).to(targets.device)
            baseline = log_probs if baseline is None else baseline
            own.append(_score(baseline, log_probs, targets))
    return [
        Reading(Scores(*(torch.cat(parts, dim=1).cpu() for parts in zip(*own, strict=True))), kv_bytes(cache))
        for own, cache in zip(scores, caches, strict=True)
    ]


def _feed(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,  # [batch, chunk]
) -> Tensor:  # [batch, chunk, vocab]
    return model(input_ids=ids.to(model.device), **{CACHE_KEYWORD: cache}, use_cache=True).logits


def _score(
    baseline: Tensor,  # [batch, chunk, vocab] log-probabilities
    log_probs: Tensor,  # [batch, chunk, vocab]
    targets: Tensor,  # [batch, chunk]
) -> Scores:  # of the chunk
    nll = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    # Where a probability is 0 its logarithm is −inf, and 0 · −inf would be NaN.
    kl = torch.where(baseline > -torch.inf, baseline.exp() * (baseline - log_probs), 0.0).sum(dim=-1)
    choice = log_probs.argmax(dim=-1)
    return Scores(nll, kl, baseline.argmax(dim=-1) == choice, choice == targets)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Concatenate the segments of several batches."""
    return Scores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
