"""Forwards that break off before all layers have written: said at the next call, and never a wrong token."""

import pytest
import torch

from hf_kvopt import CacheStateError, PagedCache
from tests.helpers import eager_tokens, generate, prompt, tiny_config, tiny_model

CACHES = {
    "growing": lambda: PagedCache(tiny_config("full")),
    "growing, without a config": lambda: PagedCache(),
    "fixed": lambda: PagedCache(tiny_config("full"), max_tokens=256, compileable=True),
}


def break_off(model, layer_idx):
    """Let the next forward fail in the MLP behind attention `layer_idx`; returns the hook."""

    def fail(*_):
        raise KeyboardInterrupt

    return model.model.layers[layer_idx].mlp.register_forward_hook(fail)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_a_first_forward_that_broke_off_is_not_continued_by_a_longer_prompt(make_cache):
    model, cache = tiny_model(), make_cache()
    hook = break_off(model, 0)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(20), cache)
    hook.remove()
    with pytest.raises(CacheStateError, match=r"stopped half way.*0 are left.*with the whole text"):
        generate(model, prompt(30), cache)
    assert torch.equal(generate(model, prompt(30), cache), eager_tokens("full", 30))


def test_a_step_of_fixed_capacity_that_broke_off_is_taken_back():
    model, cache = tiny_model(), CACHES["fixed"]()
    tokens = generate(model, prompt(20), cache)
    longer = {"input_ids": torch.cat([tokens, prompt(3)["input_ids"]], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    hook = break_off(model, 0)
    with pytest.raises(KeyboardInterrupt):
        generate(model, longer, cache)
    hook.remove()
    with pytest.raises(CacheStateError, match=r"stopped half way.*taken back and 31 are left"):
        generate(model, longer, cache)
    assert torch.equal(generate(model, longer, cache), generate(model, longer))


def test_a_compiled_prefill_of_fixed_capacity_agrees():
    model, cache = tiny_model(), CACHES["fixed"]()
    ids = prompt(20)["input_ids"]
    with torch.no_grad():
        want = model(ids).logits
        got = torch.compile(model, backend="eager")(ids, past_key_values=cache).logits
    torch._dynamo.reset()
    assert (got - want).abs().max() < 1e-4
