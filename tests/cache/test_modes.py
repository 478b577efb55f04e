"""Caches that are made under one of inference_mode and no_grad, and written, copied and reordered under the other."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache, QuantizedPagedCache
from tests.helpers import prompt, tiny_model
from tests.models.cases import covered_cases
from tests.models.inputs import inputs_for
from tests.models.tiny import build

MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad}
FIXED = {"max_tokens": 2 * 64, "compileable": True}
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "fixed": FIXED,
    "int8": {"format": "int8", "skip_layers": ()},
    "fixed int8": {"format": "int8", **FIXED},
    "int4": {"format": "int4", "skip_layers": ()},
    "fixed int4": {"format": "int4/int4", **FIXED},
}
# States in layers of their own, beside keys, and none.
STATES = [case for case in covered_cases() if case.name in ("bamba", "falcon_h1", "lfm2")]


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """Give keys a shift that a guarded cache learns."""
    for path, module in model.named_modules():
        if path.endswith("k_proj"):
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
            module.bias.data[model.config.head_dim - 1] = 25.0
    return model


def steps(
    model: PreTrainedModel, inputs: dict[str, Tensor], make: Callable[[], PagedCache], modes: list[str]
) -> Tensor:
    """Feed a prompt in two pieces, then tokens one by one, each under the next of `modes`; returns all logits."""
    ids, mask, cache, found = inputs["input_ids"], inputs["attention_mask"], make(), []
    pieces = [ids[:, :5], ids[:, 5:], *ids[:, -4:].split(1, dim=1)]
    held = 0
    for i, piece in enumerate(pieces):
        held += piece.shape[1]
        seen = torch.nn.functional.pad(mask, (0, max(0, held - mask.shape[1])), value=1)[:, :held]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        with MODES[modes[i % len(modes)]]():
            if i == 2:
                cache = copy.deepcopy(cache)
            if i == 3:
                cache.reorder_cache(torch.tensor([1, 0]))
                cache.reorder_cache(torch.tensor([1, 0]))
            if i == 4 and not cache._stock_layers():
                cache = pickle.loads(pickle.dumps(cache))
            if cache.cache_config.compileable and piece.shape[1] == 1:
                seen = torch.nn.functional.pad(seen, (0, 64 - held))
            out = model(piece, attention_mask=seen, position_ids=positions, **{CACHE_KEYWORD: cache})
            found.append(out.logits[:, -1].clone())
    return torch.stack(found)


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    "modes", [["inference", "no grad"], ["no grad", "inference"], ["inference", "inference", "no grad"]]
)
def test_a_cache_goes_from_one_mode_to_the_other(modes: list[str], options: dict[str, Any]) -> None:
    model = loud(tiny_model())
    kind = QuantizedPagedCache if "format" in options else PagedCache

    def make() -> PagedCache:
        return kind(model.config, **options)

    assert torch.equal(steps(model, prompt(20, 20), make, modes), steps(model, prompt(20, 20), make, ["no grad"]))


@pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)
@pytest.mark.parametrize("modes", [["inference", "no grad"], ["no grad", "inference"]])
def test_states_go_from_one_mode_to_the_other(modes: list[str], case: Any) -> None:
    model = build(case, ATTENTION_NAME)
    inputs = inputs_for(case, model)

    def make() -> PagedCache:
        return PagedCache(model.config)

    assert torch.equal(steps(model, inputs, make, modes), steps(model, inputs, make, ["no grad"]))
