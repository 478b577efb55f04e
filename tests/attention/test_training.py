"""Training goes through the attention as through eager; the paged cache refuses it."""

import logging

import pytest
import torch
from transformers import DynamicCache

from hf_kvopt import CACHE_KEYWORD, PagedCache
from hf_kvopt.errors import CacheStateError
from tests.attention.models import assert_equal, pair, prompts

NAMES = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]
MASKS = {"no padding": [[1] * 12] * 2, "left": [[1] * 12, [0] * 5 + [1] * 7], "right": [[1] * 12, [1] * 7 + [0] * 5]}


def gradients(model, ids, mask):
    # Neither pads nor the first token behind them, which a pad would have to predict.
    labels = ids.masked_fill((mask & mask.roll(1, dims=1)) == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], allow_unused=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_eager(name, rows):
    eager, ours = pair(name)
    ids, mask = prompts(), torch.tensor(rows)
    want, got = gradients(eager, ids, mask), gradients(ours, ids, mask)
    for weight, gradient in want.items():
        assert (got[weight] is None) == (gradient is None)
        if gradient is not None:
            scale = max(1e-3, gradient.abs().max().item())
            assert (got[weight] - gradient).abs().max() <= 1e-4 * scale, weight


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_gradient_checkpointing_are_the_same(name):
    ours = pair.__wrapped__(name)[1]
    ids, mask = prompts(), torch.tensor(MASKS["left"])
    want = gradients(ours, ids, mask)
    ours.train()
    ours.gradient_checkpointing_enable()
    got = gradients(ours, ids, mask)
    for weight, gradient in want.items():
        assert gradient is None or torch.allclose(got[weight], gradient, atol=1e-5), weight


def test_attention_dropout_works_in_training_alone():
    ours = pair.__wrapped__("llama")[1]
    ids = prompts()
    with torch.no_grad():
        exact = ours(input_ids=ids, use_cache=False).logits
        for layer in ours.model.layers:
            layer.self_attn.attention_dropout = 0.5
        assert torch.equal(ours(input_ids=ids, use_cache=False).logits, exact)
    ours.train()
    torch.manual_seed(0)
    loss = ours(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert not torch.allclose(ours(input_ids=ids, use_cache=False).logits, exact)
    assert all(weight.grad.isfinite().all() for weight in ours.parameters())


def test_a_paged_cache_refuses_states_that_want_gradients():
    ours = pair("llama")[1]
    cache = PagedCache()
    with pytest.raises(CacheStateError, match="keeps no graph of its writes"):
        ours(input_ids=prompts(), **{CACHE_KEYWORD: cache})
    with torch.no_grad():
        assert_equal(ours(input_ids=prompts(), **{CACHE_KEYWORD: cache}).logits, ours(input_ids=prompts()).logits)


def test_a_dense_cache_carries_gradients():
    eager, ours = pair("llama")
    ids = prompts()
    found = []
    for model in (eager, ours):
        cache = DynamicCache()
        model(input_ids=ids[:, :8], **{CACHE_KEYWORD: cache})
        logits = model(input_ids=ids[:, 8:], **{CACHE_KEYWORD: cache}).logits
        weight = model.model.layers[0].self_attn.k_proj.weight
        found.append(torch.autograd.grad(logits.square().mean(), weight)[0])
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4 * found[0].abs().max())


def test_a_gather_for_a_foreign_operation_is_said_once(caplog):
    eager, _ = pair("llama")
    with caplog.at_level(logging.WARNING, logger="hf_kvopt"), torch.no_grad():
        for _ in range(3):
            cache = PagedCache()
            for first in (0, 5, 6):
                eager(input_ids=prompts()[:, first : first + 1], **{CACHE_KEYWORD: cache})
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("hf_kvopt")]
    assert len(messages) == len(set(messages))
