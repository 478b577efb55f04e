"""Prompts that begin alike, and a count of what a model is made to compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_kvopt import PagedCache, PrefixStore
from tests.helpers import VOCAB, generate, tiny_model


def text(length: int, seed: int = 0) -> list[int]:
    """Draw a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def batch(*texts: list[int], columns: int = 0) -> dict[str, Tensor]:
    """Pad texts on the left to one length (at least `columns`)."""
    width = max([columns, *map(len, texts)])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in texts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in texts])
    return {"input_ids": ids, "attention_mask": mask}


def eager(kind: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Tokens of eager attention from a fresh cache of transformers."""
    model = tiny_model(kind, "eager")
    return generate(model, inputs, DynamicCache(config=model.config), **options)


def shared_model(kind: str = "full", **options: Any) -> tuple[PreTrainedModel, PrefixStore]:
    """A tiny model and a store of it, which does not keep it alive."""
    model = tiny_model(kind)
    return model, PrefixStore(model, **options)


def turn(store: PrefixStore, model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """One explicit turn: cache, generate, commit."""
    cache = store.cache(**inputs)
    output: Tensor = generate(model, inputs, cache, **options)
    store.commit(cache, output)
    store.check_integrity()
    return output


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the number of token positions of every forward into a paged cache, padding included.

    A hook on the model would not do: what the model is made to compute with a hook is another text's worth.
    """
    seen: list[int] = []
    original = PagedCache.update

    def note(cache: PagedCache, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        if layer_idx == 0:
            seen.append(key_states.shape[0] * key_states.shape[2])
        return original(cache, key_states, value_states, layer_idx, *args, **kw)

    PagedCache.update = note
    try:
        yield seen
    finally:
        PagedCache.update = original
