"""What a bounded cache must give: plain transformers over the whole text, with the dropped tokens masked out by hand.

Written from the promise alone: a token goes once its whole block may go, and a forward that begins behind c tokens
sees what is kept of c tokens, and its own.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import EvictionPolicy

SIZE = 16


def kept(policy: EvictionPolicy, length: int, size: int = SIZE) -> list[int]:
    """Tokens that a row of `length` tokens still holds, token by token."""
    named = {token for one in policy.after_step(length // size * size) for token in one}
    return [t for t in range(length) if not set(range(t // size * size, (t // size + 1) * size)) <= named]


def seen_mask(policy: EvictionPolicy, forwards: Sequence[int], size: int = SIZE) -> Tensor:
    """[1, 1, tokens, tokens] float mask of a text read in forwards that begin at `forwards`, the last entry its end."""
    length = forwards[-1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min)
    for start, stop in pairwise(forwards):
        past = kept(policy, start, size)
        for query in range(start, stop):
            mask[query, past] = 0
            mask[query, start : query + 1] = 0
    return mask[None, None]


def dense_logits(
    model: PreTrainedModel, text: Tensor, policy: EvictionPolicy, forwards: Sequence[int], size: int = SIZE
) -> Tensor:
    """[tokens, vocab] of `text` [tokens], read by an eager model without a cache."""
    mask = seen_mask(policy, forwards, size)
    with torch.no_grad():
        positions = torch.arange(len(text))[None]
        logits: Tensor = model(
            input_ids=text[None], attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[0]
    return logits


def assert_same_tokens(
    model: PreTrainedModel, text: Tensor, num_prompt: int, policy: EvictionPolicy, size: int = SIZE
) -> None:
    """Check greedy tokens of one row [tokens] without padding: the prompt is read at once, then tokens one by one."""
    forwards = [0, *range(num_prompt, len(text) + 1)]
    logits = dense_logits(model, text, policy, forwards, size)
    assert torch.equal(logits[num_prompt - 1 : -1].argmax(-1), text[num_prompt:])
