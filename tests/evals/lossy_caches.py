"""Caches that lose something on purpose, named on the command line as `tests.evals.lossy_caches:<factory>`."""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


class RoundedCache(DynamicCache):
    """Stores keys and values rounded to quarters, and hands back what it stores."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update((key_states * 4).round() / 4, (value_states * 4).round() / 4, *args, **kwargs)


class FirstReadExactCache(RoundedCache):
    """Hands back a first prompt as it came: in one forward over a text nothing seems lost."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer_idx = args[0] if args else kwargs["layer_idx"]
        is_first = self.get_seq_length(layer_idx) == 0
        stored = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if is_first else stored


def rounded(model: PreTrainedModel, max_len: int) -> Cache:
    return RoundedCache(config=model.config)


def first_read_exact(model: PreTrainedModel, max_len: int) -> Cache:
    return FirstReadExactCache(config=model.config)
