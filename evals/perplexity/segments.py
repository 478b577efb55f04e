"""Held-out text as segments of one length, each read on its own."""

from collections.abc import Iterable

import torch
from torch import Tensor

from evals._common.cli import BadArgumentError
from evals._common.models import Subject
from evals._common.prompts import token_stream

_RANDOM_SEGMENTS = 4


def make_segments(
    subject: Subject,
    texts: Iterable[str],
    context: int,  # tokens of a segment, its start token included
    num_segments: int | None,  # None: all there are
) -> Tensor:  # [num_segments, context] int64
    """Cut texts into segments that begin with the start token, and take `num_segments`, evenly spread.

    Texts that are shorter are read on with the next one, as the lines of a data set are; what is left over at the end
    of a longer one is dropped, so that none is joined to another document. Without a tokenizer the ids are random.

    Raises:
        BadArgumentError: the texts hold less than one segment.
    """
    if subject.tokenizer is None:
        count = num_segments or _RANDOM_SEGMENTS
        return token_stream(subject, (), context * count).view(count, context)
    first = subject.tokenizer.bos_token_id
    start = [] if first is None else [first]
    width = context - len(start)
    if width < 1:
        raise BadArgumentError(f"--context must leave room for a token behind the start token: got {context}")
    segments: list[list[int]] = []
    held: list[int] = []
    for text in texts:
        ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        is_long = len(ids) >= width
        held = ids if is_long else held + ids
        whole = len(held) // width
        segments += [start + held[i * width : (i + 1) * width] for i in range(whole)]
        held = [] if is_long else held[whole * width :]
    if not segments:
        raise BadArgumentError(f"the texts hold less than one segment of {context} tokens: use a smaller --context")
    return torch.tensor(_spread(segments, num_segments))


def _spread(items: list[list[int]], count: int | None) -> list[list[int]]:
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]
