"""Every model with states shares prefixes to exactly the tokens of plain decoding, or refuses with one clear error."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_kvopt import CACHE_KEYWORD, PrefixStore, UnsupportedModel, compat
from tests.models import expected
from tests.models.cases import Case, covered_cases
from tests.models.kinds import layer_kinds
from tests.models.tiny import build

STATEFUL = [
    case for case in covered_cases() if case.modality == "text" and any("states" in kind for kind in layer_kinds(case))
]
SHARED = [case for case in STATEFUL if case.name not in expected.NOT_SHARED]
REFUSED = [case for case in STATEFUL if case.name in expected.NOT_SHARED]
NEW = 8


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Texts that begin alike, padded on the left."""
    draws = torch.Generator().manual_seed(3)
    trunk, width = torch.randint(5, 50, (70,), generator=draws).tolist(), max(lengths)
    rows = [(trunk[:50] + torch.randint(5, 50, (n,), generator=draws).tolist())[:n] for n in lengths]
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - n) + [1] * n for n in lengths])}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    tokens: Tensor = model.generate(**inputs, max_new_tokens=NEW, **{CACHE_KEYWORD: cache})
    return tokens


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_shared_prefixes_and_second_turns_give_the_plain_tokens(case: Case) -> None:
    model = build(case)
    store = PrefixStore(model)
    turns = [prompts(60), prompts(60), prompts(70, 64, 9)]
    for inputs in turns:
        cache = store.cache(**inputs)
        tokens = generate(model, inputs, cache)
        store.commit(cache, tokens)
        assert torch.equal(tokens, generate(model, inputs, DynamicCache(config=model.config)))
    assert store.stats().hit_tokens >= 48
    ids = torch.cat([tokens[:1], prompts(9)["input_ids"]], dim=1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = store.cache(**second)
    assert cache.num_shared == 70 + NEW - 1
    assert torch.equal(generate(model, second, cache), generate(model, second, DynamicCache(config=model.config)))


def test_planning_knows_the_models_that_forget() -> None:
    forgetful = [name for name, reason in expected.NOT_SHARED.items() if "forgets" in reason]
    assert sorted(forgetful) == sorted(compat.FORGETFUL)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_others_are_refused_when_the_store_is_made(case: Case) -> None:
    with pytest.raises(UnsupportedModel):
        PrefixStore(build(case))
