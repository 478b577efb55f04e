"""Multi-head latent attention over the cached latents."""

import pytest
import torch
from torch import nn

import hf_kvopt
from hf_kvopt.attention.mla import LatentKV
from tests.attention.models import assert_equal, case_named, prompts
from tests.models.tiny import build


@pytest.fixture
def model():
    return build(case_named("deepseek_v3"), "eager")


def logits(model, ids, pieces):
    cache = hf_kvopt.PagedCache(model.config)
    with torch.no_grad():
        parts = [model(piece, **{hf_kvopt.CACHE_KEYWORD: cache}).logits for piece in ids.split(pieces, dim=1)]
    return torch.cat(parts, dim=1), cache


def test_decoding_reads_latents_and_expands_nothing(model, monkeypatch):
    ids = prompts(2, 20)
    want, _ = logits(model, ids, [12] + [1] * 8)
    hf_kvopt.enable(model)
    monkeypatch.setattr(LatentKV, "expand_both", lambda self: pytest.fail("a decode step expanded the cache"))
    monkeypatch.setattr("hf_kvopt.attention.mla._MAX_ABSORBED_QUERIES", 12)
    got, cache = logits(model, ids, [12] + [1] * 8)
    assert_equal(got, want)
    assert cache.stats().dense_fallbacks == 0


def test_a_long_prefill_behind_a_cache_expands_and_agrees(model):
    ids = prompts(1, 60)
    want, _ = logits(model, ids, [20, 30, 10])
    hf_kvopt.enable(model)
    got, _ = logits(model, ids, [20, 30, 10])
    assert_equal(got, want)


def test_adapted_projections_are_left_to_the_model(model):
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj = nn.Sequential(module.kv_b_proj)
    ids = prompts(1, 16)
    want, _ = logits(model, ids, [12, 1, 3])
    hf_kvopt.enable(model)
    assert not any("expand_kv" in module.__dict__ for module in model.modules())
    got, _ = logits(model, ids, [12, 1, 3])
    assert_equal(got, want)


def test_disable_puts_the_expansion_back(model):
    hf_kvopt.enable(model)
    assert any("expand_kv" in module.__dict__ for module in model.modules())
    hf_kvopt.disable(model)
    assert not any("expand_kv" in module.__dict__ for module in model.modules())


def test_other_operations_on_latents_get_the_expansion(model):
    hf_kvopt.enable(model)
    cache = hf_kvopt.PagedCache(model.config)
    with torch.no_grad():
        model(prompts(1, 12), **{hf_kvopt.CACHE_KEYWORD: cache})
    module = next(module for module in model.modules() if hasattr(module, "expand_kv"))
    keys, values = module.expand_kv(cache.layers[0].keys, cache.layers[0].values)
    dense_keys, dense_values = type(module).expand_kv(
        module, cache.layers[0].keys.dense(), cache.layers[0].values.dense()
    )
    assert isinstance(keys, LatentKV)
    assert keys.shape == dense_keys.shape
    assert values.shape == dense_values.shape
    with torch.no_grad():
        assert torch.equal(keys + 0, dense_keys)
        assert torch.equal(torch.cat([values, values], dim=2), torch.cat([dense_values, dense_values], dim=2))
