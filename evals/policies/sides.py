"""Sides of the comparison: one policy at one budget, beside the cache that keeps all."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from transformers import Cache, PreTrainedModel

import hf_kvopt

WHOLE = "whole"

# Makes a policy for a share of a text of so many tokens.
POLICIES: Mapping[str, Callable[[float, int], hf_kvopt.EvictionPolicy]] = MappingProxyType(
    {
        "SinkRecent": lambda budget, context: hf_kvopt.SinkRecent(4, max(16, round(budget * context) - 20)),
        "Knorm": lambda budget, context: hf_kvopt.Knorm(budget),
        "TOVA": lambda budget, context: hf_kvopt.TOVA(budget),
        "SnapKV": lambda budget, context: hf_kvopt.SnapKV(budget),
        "PyramidKV": lambda budget, context: hf_kvopt.PyramidKV(budget),
        "ExpectedAttention": lambda budget, context: hf_kvopt.ExpectedAttention(budget),
    }
)


class PolicySide(NamedTuple):
    """A policy by name, and the share of a text that it may keep."""

    policy: str
    budget: float

    def __str__(self) -> str:
        return self.policy if self.policy == WHOLE else f"{self.policy} {self.budget:.0%}"

    def make_cache(self, model: PreTrainedModel, max_len: int) -> Cache:
        """Make an empty cache for texts of `max_len` tokens."""
        policy = None if self.policy == WHOLE else POLICIES[self.policy](self.budget, max_len)
        return hf_kvopt.PagedCache(model.config, policy=policy)

    def attend(self, model: PreTrainedModel) -> PreTrainedModel:
        """Switch the model to this library's attention, and return it."""
        if model.config._attn_implementation != hf_kvopt.ATTENTION_NAME:
            model.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
        return model
