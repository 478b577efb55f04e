"""Presets of `enable`: what the planner chooses, said in one line, on the model that is enabled."""

import copy
from typing import Any

import pytest
import torch

import hf_kvopt
from hf_kvopt import disable, enable, enabled
from hf_kvopt.presets import PRESETS, resolve
from tests.helpers import eager_tokens, generate, prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
CARD = hf_kvopt.plan.get_device("H200")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_the_planner_chooses_and_says_it_in_one_line(name: str, capsys: Any) -> None:
    model = tiny_model()
    assert enable(model, name) is model
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    state, chosen = enabled(model), resolve(name, model)
    assert state is not None
    assert said.strip() == chosen.said
    assert (state.cache, state.prefix_sharing) == (chosen.cache, chosen.options.get("prefix_sharing", False))
    assert f'cache="{state.cache}"' in said
    got = generate(model, prompt(17, 33, 5))
    if state.cache == "paged":
        assert got.equal(eager_tokens("full", 17, 33, 5))
    assert disable(model) is model
    assert enabled(model) is None


def test_lowest_memory_takes_the_smallest_cache_of_all_that_were_weighed() -> None:
    model = tiny_model()
    made = hf_kvopt.plan.plan(model.config, device="cpu", context=2048, workload="batch", dtype="float32", fixed=False)
    smallest = min(made.weighed, key=lambda one: one.kv_bytes).option
    assert resolve("lowest memory", model).cache == smallest.format
    assert smallest.format != "native"


def test_chat_shares_prefixes_and_throughput_does_not() -> None:
    model = tiny_model()
    assert resolve("chat", model).options["prefix_sharing"] is True
    assert "prefix_sharing" not in resolve("throughput", model).options


def test_what_is_given_beside_a_preset_wins() -> None:
    model = enable(tiny_model(), "chat", draft="lookahead", max_tokens=4096, block_size=32)
    state = enabled(model)
    assert state is not None
    assert (state.draft, state.options["max_tokens"], state.options["block_size"]) == ("lookahead", 4096, 32)
    assert state.prefix_sharing


def test_a_preset_never_asks_for_fixed_addresses_and_plan_says_why() -> None:
    question = {"device": CARD, "context": "2k", "workload": "batch", "dtype": "bfloat16"}
    config = tiny_model().config
    assert hf_kvopt.plan.plan(config, **question).option.is_compiled
    made = hf_kvopt.plan.plan(config, **question, fixed=False)
    assert not any(one.option.is_compiled for one in made.weighed)
    said = {choice.topic: choice.reason for choice in made.choices}
    assert said["compile"] == "a cache of fixed addresses was ruled out"


def test_the_state_says_itself_in_one_line() -> None:
    model = enable(tiny_model(), cache="int8", block_size=32, draft="prompt_lookup")
    want = "Enabled(cache='int8', attention=True, prefix_sharing=False, draft='prompt_lookup', block_size=32)"
    assert repr(enabled(model)) == want
    assert repr(enabled(copy.deepcopy(model))) == want
    assert enabled(tiny_model()) is None


def test_a_misspelt_preset_is_refused_with_the_nearest_and_the_model_stays_as_it_was() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"unknown cache 'lowest memroy': .*did you mean 'lowest memory'\?"):
        enable(model, "lowest memroy")
    assert enabled(model) is None
    assert torch.equal(generate(model, prompt(9)), eager_tokens("full", 9))
