"""Sides of the comparison: one policy at one budget, beside the cache that keeps all."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import Cache, PreTrainedModel

import hf_kvopt

WHOLE = "whole"

# Of a model by share, measured once.
_HEADS: WeakKeyDictionary[PreTrainedModel, dict[float, list[list[int]]]] = WeakKeyDictionary()


def _duo(budget: float, context: int, model: PreTrainedModel) -> hf_kvopt.DuoAttention:
    """Make the policy in which a share of the KV heads keeps all, the others an eighth of the text."""
    measured = _HEADS.setdefault(model, {})
    if budget not in measured:
        measured[budget] = hf_kvopt.retrieval_heads(model, share=budget)
    return hf_kvopt.DuoAttention(measured[budget], sinks=16, recent=max(16, context // 8 - 32))


def _chunk(context: int) -> int:
    """Return the tokens of a chunk that `Hierarchical` reads."""
    return max(16, context // 8)


# Makes a policy for a share of a text of so many tokens.
POLICIES: Mapping[str, Callable[[float, int, PreTrainedModel], hf_kvopt.EvictionPolicy]] = MappingProxyType(
    {
        "SinkRecent": lambda budget, context, model: hf_kvopt.SinkRecent(4, max(16, round(budget * context) - 20)),
        "Knorm": lambda budget, context, model: hf_kvopt.Knorm(budget),
        "TOVA": lambda budget, context, model: hf_kvopt.TOVA(budget),
        "SnapKV": lambda budget, context, model: hf_kvopt.SnapKV(budget),
        "PyramidKV": lambda budget, context, model: hf_kvopt.PyramidKV(budget),
        "ExpectedAttention": lambda budget, context, model: hf_kvopt.ExpectedAttention(budget),
        "Hierarchical": lambda budget, context, model: hf_kvopt.Hierarchical(max(16, round(budget * _chunk(context)))),
        "DuoAttention": _duo,
    }
)


def make_side(policy: str, budget: float, context: int) -> "PolicySide":
    """Make the side of a policy for texts of `context` tokens."""
    return PolicySide(policy, budget, _chunk(context) if policy == "Hierarchical" else None)


class PolicySide(NamedTuple):
    """A policy by name, and the share of a text that it may keep; of DuoAttention the share of heads that keep all."""

    policy: str
    budget: float
    prefill_size: int | None = None  # pieces that a prompt is read in; None: at once

    def __str__(self) -> str:
        return self.policy if self.policy == WHOLE else f"{self.policy} {self.budget:.0%}"

    def make_cache(self, model: PreTrainedModel, max_len: int) -> Cache:
        """Make an empty cache for texts of `max_len` tokens."""
        policy = None if self.policy == WHOLE else POLICIES[self.policy](self.budget, max_len, model)
        return hf_kvopt.PagedCache(model.config, policy=policy)

    def attend(self, model: PreTrainedModel) -> PreTrainedModel:
        """Switch the model to this library's attention, and return it."""
        if model.config._attn_implementation != hf_kvopt.ATTENTION_NAME:
            model.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
        return model
