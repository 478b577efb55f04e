"""Caches that are wrong on purpose, named on the command line as `tests.evals.broken_caches:<factory>`."""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


class SwappedCache(DynamicCache):
    """Hands back the values of the first two tokens in each other's place."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        swapped = values.clone()
        swapped[:, :, 0], swapped[:, :, 1] = values[:, :, 1], values[:, :, 0]
        return keys, swapped


class PoisonedCache(DynamicCache):
    """Hands back NaN for the first token, as a block that was never written would."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        poisoned = values.clone()
        poisoned[:, :, 0] = float("nan")
        return keys, poisoned


class UnorderedCache(DynamicCache):
    """Forgets to follow the beams."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass


def swapped(model: PreTrainedModel, max_len: int) -> Cache:
    return SwappedCache(config=model.config)


def poisoned(model: PreTrainedModel, max_len: int) -> Cache:
    return PoisonedCache(config=model.config)


def unordered(model: PreTrainedModel, max_len: int) -> Cache:
    return UnorderedCache(config=model.config)
