"""A long greedy answer through a cache, held against the baseline's in two ways.

    alone      the cache writes its own answer: where it first says another token, and how many places agree in all
    forced     the cache reads the baseline's answer: the KL divergence of its next token, by distance from the prompt

The first shows what a user sees, and is a matter of luck: one early toss between two tokens of equal probability
changes everything behind it. The second shows whether errors add up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evals._common.reading import Scores, read_segments
from evals._common.sides import Side
from hf_kvopt import CACHE_KEYWORD


class Drift(NamedTuple):
    """Output of one side for a batch of prompts."""

    side: Side
    equal: Tensor  # [num_prompts, num_tokens] bool: the token of the baseline, in the same place
    forced: Scores  # [num_prompts, num_tokens - 1] along the baseline's answer

    @property
    def first_divergence(self) -> list[int]:
        """Place of the first other token of each answer; the number of tokens where there is none."""
        same = self.equal.int().cumprod(dim=1).sum(dim=1)
        return [int(place) for place in same]


def measure_drift(
    model: PreTrainedModel,
    sides: Sequence[Side],  # the first is the baseline
    prompts: Tensor,  # [num_prompts, prompt_len]
    num_tokens: int,
    chunk: int,  # tokens fed at once where the baseline's answer is read
) -> list[Drift]:
    """Write an answer with every side, and read the baseline's through every side."""
    answers = [_answer(model, side, prompts, num_tokens) for side in sides]
    read = read_segments(model, sides, torch.cat((prompts, answers[0]), dim=1), chunk, prefill=prompts.shape[1])
    return [
        Drift(side, answer == answers[0], reading.scores)
        for side, answer, reading in zip(sides, answers, read, strict=True)
    ]


@torch.inference_mode()
def _answer(model: PreTrainedModel, side: Side, prompts: Tensor, num_tokens: int) -> Tensor:  # [num_prompts, tokens]
    """Write exactly `num_tokens` greedy tokens; no token ends an answer."""
    generate: Any = side.attend(model).generate
    cache = side.make_cache(model, prompts.shape[1] + num_tokens)
    ids = prompts.to(model.device)
    written: Tensor = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **{CACHE_KEYWORD: cache},
    )
    return written[:, prompts.shape[1] :].cpu()


def by_quarter(
    values: Tensor,  # [num_prompts, num_tokens]
) -> list[float]:
    """Return the mean of each quarter of the answers, the one next to the prompt first."""
    return [float(part.double().mean()) for part in values.chunk(4, dim=1)]
