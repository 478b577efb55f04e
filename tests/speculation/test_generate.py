"""Speculative generate() calls with heads give the tokens of plain decoding, on every supported transformers."""

import copy

import pytest
import torch

import hf_kvopt
from tests.helpers import eager_tokens, prompt, tiny_model
from tests.speculation.heads import KINDS, tiny_head

NEW = 16
PLANS = {"chain": {"gamma": 3, "num_nodes": 0}, "tree": {"gamma": 3, "num_nodes": 8, "top_k": 3}, "chosen": {}}


@pytest.mark.smoke
@pytest.mark.parametrize("lengths", [(9,), (9, 6, 14)], ids=["batch 1", "batch 3, padded"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_give_the_tokens_of_plain_decoding(kind: str, plan: dict[str, int], lengths: tuple[int, ...]) -> None:
    wanted = eager_tokens("full", *lengths, max_new_tokens=NEW)
    spec = hf_kvopt.speculative(tiny_head(kind), **plan, fallback=False)
    for _ in range(2):
        got = tiny_model().generate(**prompt(*lengths), custom_generate=spec, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(got, wanted)
    assert spec.stats.steps > 0


@pytest.mark.smoke
def test_a_head_in_another_dtype_drafts_for_the_same_tokens() -> None:
    wanted = eager_tokens("full", 9, 6, max_new_tokens=NEW)
    spec = hf_kvopt.speculative(tiny_head("eagle3").to(torch.bfloat16), gamma=3, fallback=False)
    got = tiny_model().generate(**prompt(9, 6), custom_generate=spec, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, wanted)
    assert spec.stats.steps > 0


@pytest.mark.smoke
def test_an_enabled_model_speculates_in_plain_generate() -> None:
    model, spec = tiny_model(), hf_kvopt.speculative("prompt_lookup", fallback=False)
    hf_kvopt.enable(model, draft=spec)
    got = model.generate(**prompt(9, 6), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, eager_tokens("full", 9, 6, max_new_tokens=NEW))
    assert spec.stats.calls == 1


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["assistant_model", "prompt_lookup_num_tokens", "in the generation config"])
@pytest.mark.parametrize("cache", ["paged", None])
def test_another_way_that_a_call_asks_for_is_left_to_transformers(way: str, cache: str | None) -> None:
    model, spec = tiny_model(), hf_kvopt.speculative("suffix", fallback=False)
    hf_kvopt.enable(model, cache=cache, draft=spec)
    options: dict[str, object] = {"assistant_model": tiny_model(seed=1), "prompt_lookup_num_tokens": 3}
    settings: dict[str, object] = {way: options.get(way)}
    if way not in options:
        config = copy.deepcopy(model.generation_config)
        config.prompt_lookup_num_tokens = 3
        settings = {"generation_config": config}
    got = model.generate(**prompt(9), max_new_tokens=NEW, do_sample=False, **settings)
    assert torch.equal(got, eager_tokens("full", 9, max_new_tokens=NEW))
    assert spec.stats.calls == 0
    model.generate(**prompt(9), max_new_tokens=NEW, do_sample=False)
    assert spec.stats.calls == 1
