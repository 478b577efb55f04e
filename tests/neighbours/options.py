"""What a user may enable, and the tokens that each of it must give: those of the same call without it."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, set_seed

import hf_kvopt
from hf_kvopt import QuantizedPagedCache
from tests.helpers import generate, prompt

INPUTS = prompt(25, 18)
OPTIONS: dict[str, dict[str, Any]] = {
    "paged": {},
    "int8": {"cache": "int8"},
    "int4": {"cache": "int4"},
    "shared": {"prefix_sharing": True},
    "shared int8": {"cache": "int8", "prefix_sharing": True},
    "prompt lookup": {"draft": "prompt_lookup"},
}


def tokens(model: Any) -> list[list[int]]:
    """Return what one call gives."""
    return generate(model, INPUTS).tolist()


def expected(model: PreTrainedModel, name: str) -> list[list[int]]:
    """Return the tokens of a model that is not enabled: under its own cache, or under one of the option's format."""
    format = OPTIONS[name].get("cache")
    if format is None:
        return generate(model, INPUTS, DynamicCache(config=model.config)).tolist()
    before = model.config._attn_implementation
    model.set_attn_implementation("hf_kvopt")
    got = generate(model, INPUTS, QuantizedPagedCache(model.config, format=format)).tolist()
    model.set_attn_implementation(before)
    return got


def check(model: PreTrainedModel, wrapped: Any = None) -> None:
    """Assert that every option gives equal tokens twice, and that a running batch gives those of each row."""
    called = model if wrapped is None else wrapped
    for name, options in OPTIONS.items():
        want = expected(model, name)
        assert hf_kvopt.enable(called, **options) is called
        assert [tokens(called), tokens(called)] == [want, want], name
        if "prefix_sharing" in options:
            assert hf_kvopt.prefix_store(called).stats().hits == 2, name
        assert hf_kvopt.enabled(called) is not None
        assert hf_kvopt.disable(called) is called
        assert hf_kvopt.enabled(called) is None
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(INPUTS["input_ids"], INPUTS["attention_mask"], strict=True)]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "draft": "prompt_lookup"}
    want = [row[INPUTS["input_ids"].shape[1] :] for row in expected(model, "paged")]
    assert hf_kvopt.generate_many(called, rows, **settings) == want


def seeded() -> None:
    """Make the weights of adapters the same in every run."""
    set_seed(0)
    torch.manual_seed(0)
