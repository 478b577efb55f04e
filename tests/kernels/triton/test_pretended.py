"""Device branches on CPU tensors: right tokens, no wait and no copy that grows with the layers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_kvopt
from hf_kvopt import CACHE_KEYWORD, OutOfBlocks, PagedCache, QuantizedPagedCache
from hf_kvopt.kernels import attention
from hf_kvopt.kernels.triton import attention as triton
from tests.kernels.triton.pretended import pretended

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "initializer_range": 0.25,
}  # fmt: skip
ROW = 32
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "ragged": {},
    "fixed": {"max_tokens": 2 * ROW, "compileable": True},
    "int8": {"format": "int8"},
    "sealed": {"format": "int4", "block_size": 16},
    "fixed sealed": {"format": "int4", "block_size": 16, "max_tokens": 2 * ROW, "compileable": True},
    "fixed int8": {"format": "int8", "max_tokens": 2 * ROW, "compileable": True},
}


def llama(layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    model = LlamaForCausalLM._from_config(config, attn_implementation=hf_kvopt.ATTENTION_NAME).eval()
    model.generation_config.eos_token_id = None
    return model


def cache_for(model: PreTrainedModel, name: str) -> PagedCache:
    options = CACHES[name]
    kind = QuantizedPagedCache if "format" in options else PagedCache
    cache = kind(model.config, **options)
    if name == "ragged":
        for table in cache._tables.values():
            table.adopt([[], []], [0, 3], 0)
    return cache


def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids * mask, mask


def fed(model: PreTrainedModel, cache: PagedCache, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed a padded prompt and `steps` tokens; returns the mask and the next token."""
    ids, mask = text()
    token = ids
    for _ in range(steps + 1):
        seen = mask
        if cache.cache_config.compileable and token.shape[1] == 1:
            seen = torch.nn.functional.pad(mask, (0, ROW - mask.shape[1]))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -token.shape[1] :]
        out = model(token, attention_mask=seen, position_ids=positions, **{CACHE_KEYWORD: cache})
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return mask, token


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_tokens_are_those_of_the_host_branches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    _, want = fed(model, cache_for(model, name), 3)
    with pretended(monkeypatch):
        _, got = fed(model, cache_for(model, name), 3)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_a_decode_step_waits_for_nothing_and_copies_nothing_by_layer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for layers in (2, 4):
        model = llama(layers)
        cache = cache_for(model, name)
        with pretended(monkeypatch):
            # Past the sixteenth token, up to which guarded rows learn their shift.
            mask, token = fed(model, cache, 4)
        if cache.cache_config.compileable:
            mask = torch.nn.functional.pad(mask, (0, ROW - mask.shape[1]))
        positions = torch.tensor([[18], [15]])
        with pretended(monkeypatch) as costs:
            model(token, attention_mask=mask, position_ids=positions, **{CACHE_KEYWORD: cache})
        assert costs.syncs == []
        found.append(costs.copies)
    few, many = found
    assert len(few) == len(many), many
    # Block table, lengths, slots, lags and starts of a step; rows of fixed capacity have them on the device.
    assert len(few) <= (0 if "fixed" in name else 5), few


@torch.no_grad()
def test_tokens_past_the_capacity_go_nowhere_and_are_said_at_the_next_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    cache = cache_for(model, "fixed")
    ids = torch.randint(3, 97, (2, ROW), generator=torch.Generator().manual_seed(2))
    model(ids, **{CACHE_KEYWORD: cache})
    held = [plane.codes.clone() for layer in cache.layers for plane in layer.pool.planes]
    with pretended(monkeypatch):
        for _ in range(3):
            model(ids[:, :1], attention_mask=torch.ones(2, ROW), **{CACHE_KEYWORD: cache})
        now = [plane.codes for layer in cache.layers for plane in layer.pool.planes]
        assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
        for ask in (lambda: cache.layers[0].keys, cache.stats, lambda: cache.crop(-1), lambda: cache.update(
            torch.zeros(2, 1, 2, 32), torch.zeros(2, 1, 2, 32), 0
        )):  # fmt: skip
            with pytest.raises(OutOfBlocks, match="3 tokens a row were fed beyond the 32"):
                ask()
    cache.reset()
    _, want = fed(model, cache_for(model, "fixed"), 2)
    assert torch.equal(fed(model, cache, 2)[1], want)


@torch.no_grad()
def test_a_fork_of_many_rows_copies_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for beams in (2, 6):
        model = llama()
        cache = cache_for(model, "growing")
        with pretended(monkeypatch):
            mask, token = fed(model, cache, 0)
            cache.batch_repeat_interleave(beams)
            mask, token = mask.repeat_interleave(beams, 0), token.repeat_interleave(beams, 0)
        with pretended(monkeypatch) as costs:
            positions = (mask.sum(-1, keepdim=True) - 1).contiguous()
            model(token, attention_mask=mask, position_ids=positions, **{CACHE_KEYWORD: cache})
        counts.append(len(costs.copies))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "is_padded"), [("growing", True), ("fixed", True), ("int8", True), ("growing", False)], ids=str
)
@torch.no_grad()
def test_a_prompt_looks_once_at_its_padding_and_reads_no_mask(
    name: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    for layers in (1, 2):
        model, seen = llama(layers), []

        def noted(call: Any, seen: list[Any] = seen) -> torch.Tensor:
            seen.append(call.pattern)
            return triton.run(call)

        ids, mask = text()
        mask = mask if is_padded else torch.ones_like(mask)
        with pretended(monkeypatch) as costs, monkeypatch.context() as patch:
            readers = (r._replace(run=noted) if r.name == "triton" else r for r in attention.READERS)
            patch.setattr(attention, "READERS", tuple(readers))
            model(ids, attention_mask=mask, **{CACHE_KEYWORD: cache_for(model, name)})
        assert len(seen) == layers
        assert all(pattern.mask is None for pattern in seen)
        for pattern in seen:
            starts = pattern.starts
            assert (starts.tolist() == [0, 3] and starts.dtype == torch.int32) if is_padded else starts is None
        looks.append([place for place in costs.syncs if "attention.mask" in place])
    assert len(looks[0]) == len(looks[1]) == 1, looks


@torch.no_grad()
def test_padding_that_is_not_on_the_left_stays_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    ids, mask = text()
    mask[1, 6] = 0
    want = model(ids, attention_mask=mask, **{CACHE_KEYWORD: cache_for(model, "growing")}).logits
    with pretended(monkeypatch):
        got = model(ids, attention_mask=mask, **{CACHE_KEYWORD: cache_for(model, "growing")}).logits
    is_text = mask.bool()
    assert torch.allclose(got[is_text], want[is_text], atol=1e-5)
    without = model(ids, attention_mask=text()[1], **{CACHE_KEYWORD: cache_for(model, "growing")}).logits
    assert not torch.allclose(got[1, -1], without[1, -1], atol=1e-3)


@torch.no_grad()
def test_a_prompt_of_rows_that_begin_later_hides_padding_behind_their_start_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama(1)
    ids, mask = text()
    mask[0, :2] = 0  # the table knows of row 1 alone
    want = model(ids, attention_mask=mask, **{CACHE_KEYWORD: cache_for(model, "ragged")}).logits
    with pretended(monkeypatch):
        got = model(ids, attention_mask=mask, **{CACHE_KEYWORD: cache_for(model, "ragged")}).logits
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-5)
