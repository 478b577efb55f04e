"""Compiled decode steps: graphs that are counted, and a prompt with greedy steps behind it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from hf_kvopt import CACHE_KEYWORD, PagedCache
from tests.helpers import prompt


@torch.no_grad()
def decoded(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    cache: PagedCache,
    lengths: tuple[int, ...],
    steps: int,
    capacity: int | None,
) -> Tensor:
    """Feed a prompt uncompiled, then decode greedily with `forward`; returns logits [steps, batch, vocab].

    Args:
        capacity: tokens a row to which the mask is padded, as for a cache of fixed capacity; None for one that grows.
    """
    inputs = prompt(*lengths)
    mask, found = inputs["attention_mask"], []
    out = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_KEYWORD: cache})
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        padding = mask.new_zeros(len(mask), (capacity or mask.shape[1]) - mask.shape[1])
        positions = (mask.sum(-1, keepdim=True) - 1).contiguous()
        given = torch.cat([mask, padding], dim=1) if capacity is not None else mask
        out = forward(token, attention_mask=given, position_ids=positions, **{CACHE_KEYWORD: cache})
        found.append(out.logits[:, -1].clone())
    return torch.stack(found)


def compiled(model: PreTrainedModel, backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    """The model's forward as one graph, and a count of the graphs that were made."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model.forward, fullgraph=True, backend=counter), counter
