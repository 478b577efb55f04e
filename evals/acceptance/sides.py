"""Sides of the comparison: plain decoding, transformers' assisted decoding, and ours, each as one generate() call."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache

import hf_kvopt
from evals.acceptance.assistant import Assistant

Settings = Mapping[str, Any]
Call = Callable[[Mapping[str, Tensor], Settings], Tensor]


class Side(NamedTuple):
    """One way to generate."""

    name: str
    call: Call
    stats: hf_kvopt.SpeculationStats | None = None
    one_row: bool = False  # it takes only batches of one row
    facts: Mapping[str, Any] = MappingProxyType({})  # for its rows


def make_sides(
    dense: Any,  # a model with transformers' attention
    paged: Any,  # the same weights with ours
    drafts: Mapping[str, Any],
    assistant: Assistant | None,
) -> list[Side]:
    """Return the sides, the baseline first: transformers' default cache and attention."""

    def plain(inputs: Mapping[str, Tensor], settings: Settings) -> Tensor:
        out: Tensor = dense.generate(
            **inputs, **{hf_kvopt.CACHE_KEYWORD: DynamicCache(config=dense.config)}, **settings
        )
        return out

    def ours(inputs: Mapping[str, Tensor], settings: Settings) -> Tensor:
        out: Tensor = paged.generate(
            **inputs, **{hf_kvopt.CACHE_KEYWORD: hf_kvopt.PagedCache(config=paged.config)}, **settings
        )
        return out

    def lookup(inputs: Mapping[str, Tensor], settings: Settings) -> Tensor:
        out: Tensor = dense.generate(**inputs, prompt_lookup_num_tokens=6, **settings)
        return out

    def assisted(inputs: Mapping[str, Tensor], settings: Settings) -> Tensor:
        assert assistant is not None
        out: Tensor = dense.generate(**inputs, assistant_model=assistant.model, **settings)
        return out

    sides = [Side("plain, DynamicCache", plain), Side("plain, PagedCache", ours)]
    sides.append(Side("transformers' prompt lookup", lookup, one_row=True))
    ours_too = [_speculating(paged, name, draft) for name, draft in drafts.items()]
    if assistant is not None:
        facts = {"assistant": assistant.what}
        sides.append(Side("transformers' assistant", assisted, one_row=True, facts=facts))
        # Its cache and its attention are ours.
        model = copy.deepcopy(assistant.model)
        model.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
        ours_too.append(_speculating(paged, "assistant", model)._replace(facts=facts))
    return sides + ours_too


def _speculating(model: Any, name: str, draft: Any) -> Side:
    spec = hf_kvopt.speculative(draft)

    def call(inputs: Mapping[str, Tensor], settings: Settings) -> Tensor:
        out: Tensor = model.generate(**inputs, custom_generate=spec, **settings)
        return out

    return Side(name, call, spec.stats)
