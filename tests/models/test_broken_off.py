"""Forwards of models with states, loops or images that break off at any module: never a wrong text afterwards.

A call that broke off is made again, over the cache that it left: it gives what transformers' own cache gives where
nothing breaks off, or one clear error.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hf_kvopt
from hf_kvopt import CACHE_KEYWORD, CacheStateError, KVOptError, PagedCache
from tests.models.cases import Case, covered_cases
from tests.models.expected import MISMASKED
from tests.models.inputs import Inputs, inputs_for
from tests.models.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")
# States in layers of their own, beside keys, and in the modules; loops with and without states; layers that hold
# nothing; cross attention to an image.
NAMES = (
    "bamba", "falcon_h1", "recurrent_gemma", "inkling2_loop_text", "dory", "gemma3n_text",
    "MllamaForConditionalGeneration",
)  # fmt: skip
CASES = {case.name: case for case in covered_cases() if case.name in NAMES and case.name not in MISMASKED}
PLACES = 10  # modules at which a forward breaks off, spread over all


class Breaker:
    """Counts the modules that a model calls, and breaks off behind one of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_calls, self.at = 0, -1
        for module in model.modules():
            module.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.num_calls += 1
        if self.num_calls == self.at:
            raise KeyboardInterrupt

    def arm(self, at: int) -> None:
        """Break off behind the call of that number from now on; never for -1."""
        self.num_calls, self.at = 0, at


def write(model: PreTrainedModel, inputs: Inputs, cache: Any, new: int = 6) -> Tensor:
    return model.generate(**inputs, max_new_tokens=new, disable_compile=True, **{CACHE_KEYWORD: cache})


def longer(inputs: Inputs, text: Tensor) -> Inputs:
    """The next turn: `text` and three tokens behind it."""
    more = torch.randint(3, 60, (len(text), 3), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([text, more], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
    kept = {name: value for name, value in inputs.items() if name == "cross_attention_mask"}
    return {**kept, "input_ids": ids, "attention_mask": mask}


def places(model: PreTrainedModel, breaker: Breaker, inputs: Inputs) -> Iterator[int]:
    """Calls of modules in one forward at which to break off."""
    breaker.arm(-1)
    write(model, inputs, PagedCache(config=model.config.get_text_config(decoder=True)), new=1)
    total = breaker.num_calls
    return iter(sorted({1 + total * i // PLACES for i in range(PLACES)}))


@pytest.mark.parametrize("attention", ["eager", hf_kvopt.ATTENTION_NAME])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_first_call_that_broke_off_gives_no_wrong_text_to_the_next(case: Case, attention: str) -> None:
    model = build(case, attention)
    breaker, inputs, config = Breaker(model), inputs_for(case, model), model.config.get_text_config(decoder=True)
    if case.modality == "image":
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    again = longer(inputs, inputs["input_ids"])
    want = write(model, again, DynamicCache(config=config))
    for place in places(model, breaker, inputs):
        cache = PagedCache(config=config)
        breaker.arm(place)
        with suppress(KeyboardInterrupt):
            write(model, inputs, cache)
        breaker.arm(-1)
        with suppress(KVOptError):
            assert torch.equal(write(model, again, cache), want), place
        cache.reset()
        assert torch.equal(write(model, again, cache), want), place
        cache.check_integrity()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_decode_step_that_broke_off_gives_no_wrong_text_to_the_next(case: Case) -> None:
    model = build(case)
    breaker, inputs, config = Breaker(model), inputs_for(case, model), model.config.get_text_config(decoder=True)
    plain = DynamicCache(config=config)
    again = longer(inputs, write(model, inputs, plain))
    want = write(model, again, plain)
    breaker.arm(-1)
    write(model, inputs, PagedCache(config=config), new=1)
    prefill = breaker.num_calls
    breaker.arm(-1)
    write(model, inputs, PagedCache(config=config), new=2)
    step = breaker.num_calls - prefill
    for place in sorted({prefill + 1 + step * i // PLACES for i in range(PLACES)}):
        cache = PagedCache(config=config)
        breaker.arm(place)
        with pytest.raises(KeyboardInterrupt):
            write(model, inputs, cache)
        breaker.arm(-1)
        with suppress(KVOptError):
            assert torch.equal(write(model, again, cache), want), place
        cache.check_integrity()


@pytest.mark.parametrize("attention", ["eager", hf_kvopt.ATTENTION_NAME])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_turn_that_broke_off_gives_no_wrong_text_to_the_next(case: Case, attention: str) -> None:
    model = build(case, attention)
    breaker, inputs, config = Breaker(model), inputs_for(case, model), model.config.get_text_config(decoder=True)
    plain = DynamicCache(config=config)
    again = longer(inputs, write(model, inputs, plain))
    want = write(model, again, plain)
    for place in places(model, breaker, inputs):
        cache = PagedCache(config=config)
        write(model, inputs, cache)
        breaker.arm(place)
        with suppress(KeyboardInterrupt, CacheStateError):
            write(model, again, cache)
        breaker.arm(-1)
        with suppress(KVOptError):
            assert torch.equal(write(model, again, cache), want), place
        cache.check_integrity()


@pytest.mark.parametrize("case", [case for name, case in CASES.items() if name == "recurrent_gemma"])
def test_states_in_the_modules_are_no_cache_to_go_on_from(case: Case) -> None:
    model = build(case)
    inputs, cache = inputs_for(case, model), PagedCache(config=model.config)
    again = longer(inputs, write(model, inputs, cache))
    with pytest.raises(CacheStateError, match=r"keeps its recurrent states in its modules.*whole text"):
        write(model, again, cache)
    cache.reset()
    assert torch.equal(write(model, again, cache), write(model, again, DynamicCache(config=model.config)))
