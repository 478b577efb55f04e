"""Requests of chat-like lengths, cut from real text, and when they arrive."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evals.fragmentation.workload import SYSTEM_PROMPTS
from evals.fragmentation.workload import draw as draw_chats


class Chat(NamedTuple):
    """One request."""

    prompt: list[int]
    num_new: int


def draw(num_requests: int, stream: Tensor, scale: int, seed: int) -> list[Chat]:
    """Draw requests whose lengths are those of the fragmentation eval over `scale`; system prompts are shared.

    Args:
        num_requests: how many.
        stream: [tokens] token ids of a text.
        scale: all lengths are divided by it, as a CPU reads few tokens a second.
        seed: of the lengths and places in the text.
    """
    rng = random.Random(seed)
    text: list[int] = stream.tolist()
    systems = [text[i * length : (i + 1) * length] for i, length in enumerate(n // scale for n in SYSTEM_PROMPTS)]
    chats = []
    for one in draw_chats(num_requests, seed, 1.0):
        length = max(2, one.prompt_len // scale)
        first = rng.randrange(max(1, len(text) - length))
        prompt = text[first : first + length]
        if one.system is not None:
            prompt = [*systems[one.system], *prompt][:length]
        chats.append(Chat(prompt, max(1, one.output_lens[0] // scale)))
    return chats


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests of a Poisson process of `rate` a second come."""
    rng, clock, times = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        clock += rng.expovariate(rate)
        times.append(clock)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    return float(torch.tensor(sorted(values)).quantile(share)) if values else float("nan")
