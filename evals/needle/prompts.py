"""Prompts with a needle: a line planted at a depth of other text, asked for again at the end.

    start  hay ...  NEEDLE  ... hay  QUESTION  ANSWER          as many tokens in all as the context says

The answer is part of the prompt (teacher-forced): what is scored is the probability of its tokens, so a model that
would also say other things is not failed for it.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from evals._common.cli import BadArgumentError
from evals._common.models import Subject
from evals._common.prompts import token_stream

_NAMES = ("window", "packet", "colour", "number", "handle", "parser", "button", "stream", "folder", "signal", "thread")
_RANDOM_NEEDLE = 8


class Needle(NamedTuple):
    """Needle that is planted, and the question at the end."""

    planted: list[int]
    question: list[int]
    answer: list[int]


class Prompts(NamedTuple):
    """Prompts of one context and depth."""

    context: int
    depth: float
    ids: Tensor  # [samples, context] int64
    answer_lens: list[int]  # tokens of each row's answer, its last ones


def _assignment(rng: random.Random) -> tuple[str, str, str]:
    """A constant of a Python module, and its name again: the copying that a small model of code learns."""
    name = "_".join(rng.sample(_NAMES, 2)).upper()
    value = _digits(rng, 6)
    return f"\n{name} = '{value}'\n", f"\n{name} = '", f"{value}'"


def _passkey(rng: random.Random) -> tuple[str, str, str]:
    """The passkey task of Mohtashami and Jaggi 2023, "Landmark Attention"."""
    value = _digits(rng, 5)
    planted = f"\nThe pass key is {value}. Remember it. {value} is the pass key.\n"
    return planted, "\nWhat is the pass key? The pass key is", f" {value}"


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


TASKS: Mapping[str, Callable[[random.Random], tuple[str, str, str]]] = MappingProxyType(
    {"assignment": _assignment, "passkey": _passkey}
)


def make_prompts(
    subject: Subject,
    texts: Iterable[str],
    task: str,
    contexts: Iterable[int],
    depths: Iterable[float],  # 0: right behind the start, 1: right before the question
    samples: int,
    seed: int,
) -> list[Prompts]:
    """Plant `samples` needles at every depth of every context; all cells of a sample have the same needle.

    Raises:
        BadArgumentError: a context is too short for needle, question and answer.
    """
    contexts, depths = list(contexts), list(depths)
    hay = token_stream(subject, texts, max(contexts) * (samples + 1), seed)
    needles = [_needle(subject, task, random.Random(f"{seed} {sample}")) for sample in range(samples)]
    starts = [sample * max(contexts) for sample in range(samples)]
    return [
        Prompts(
            context,
            depth,
            torch.stack(
                [_plant(subject, n, hay[start:], context, depth) for n, start in zip(needles, starts, strict=True)]
            ),
            [len(needle.answer) for needle in needles],
        )
        for context in contexts
        for depth in depths
    ]


def _needle(subject: Subject, task: str, rng: random.Random) -> Needle:
    tokenizer = subject.tokenizer
    if tokenizer is None:
        vocab_size = subject.model.config.get_text_config().vocab_size
        ids = [rng.randrange(3, vocab_size) for _ in range(_RANDOM_NEEDLE)]
        return Needle(ids, ids[:2], ids[2:])
    return Needle(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in TASKS[task](rng)))


def _plant(
    subject: Subject,
    needle: Needle,
    hay: Tensor,  # [at least context]
    context: int,
    depth: float,
) -> Tensor:  # [context] int64
    first = getattr(subject.tokenizer, "bos_token_id", None)
    start = [] if first is None else [first]
    room = context - len(start) - sum(map(len, needle))
    if room < 0:
        raise BadArgumentError(f"--contexts must leave room for a needle of {context - room} tokens: got {context}")
    before = round(room * depth)
    hay_ids = hay[:room].tolist()
    return torch.tensor(
        [*start, *hay_ids[:before], *needle.planted, *hay_ids[before:], *needle.question, *needle.answer]
    )
