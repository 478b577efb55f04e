"""Sealed blocks of fixed capacity: a compiled step gives the bits of a growing cache, block after block."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from hf_kvopt import CACHE_KEYWORD, CacheStateError, OutOfBlocks, QuantizedPagedCache
from tests.cache.sealed import FORMATS
from tests.helpers import generate, prompt, tiny_model

BLOCK, ROW = 16, 160
PADDED = (37, 64, 5)


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def new_cache(model: PreTrainedModel, name: str, batch: int = 3, *, fixed: bool = True) -> QuantizedPagedCache:
    """Build a cache of ROW tokens a row, or a growing one."""
    capacity: dict[str, Any] = {"max_tokens": batch * ROW, "compileable": True} if fixed else {}
    return QuantizedPagedCache(model.config, format=name, skip_layers=(), block_size=BLOCK, **capacity)


@torch.no_grad()
def logits_of(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    cache: QuantizedPagedCache,
    lengths: tuple[int, ...] = PADDED,
    steps: int = 50,
) -> Tensor:
    """Feed a prompt uncompiled, then decode greedily with `forward`; returns logits [steps, batch, vocab]."""
    inputs = prompt(*lengths)
    mask, found = inputs["attention_mask"], []
    out = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_KEYWORD: cache})
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        padding = mask.new_zeros(len(mask), ROW - mask.shape[1])
        positions = (mask.sum(-1, keepdim=True) - 1).contiguous()
        given = torch.cat([mask, padding], dim=1) if cache.is_compileable else mask
        out = forward(token, attention_mask=given, position_ids=positions, **{CACHE_KEYWORD: cache})
        found.append(out.logits[:, -1].clone())
    return torch.stack(found)


def compiled(model: PreTrainedModel, backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    """The model's forward as one graph, and a count of the graphs that were made."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model.forward, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("name", FORMATS)
def test_steps_are_one_graph_and_equal_those_of_a_growing_cache(name: str) -> None:
    model = tiny_model()
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, name, fixed=False))
    assert torch.equal(logits_of(model, model, new_cache(model, name)), want)
    for _ in range(2):
        assert torch.equal(logits_of(step, model, new_cache(model, name)), want)
        assert counter.frame_count == 1


def test_a_second_turn_a_cut_and_a_new_text_go_on_as_in_a_growing_cache() -> None:
    model = tiny_model()
    fixed, growing = new_cache(model, "int4", 1), new_cache(model, "int4", 1, fixed=False)
    ids = prompt(70)["input_ids"]

    def texts(cache: QuantizedPagedCache) -> Iterator[Tensor]:
        for _ in range(2):
            for part in (ids[:, :37], *ids[:, 37:60].split(1, dim=1), ids, ids[:, :3]):
                yield model(part, **{CACHE_KEYWORD: cache}).logits
            cache.crop(-5)
            for part in (ids[:, :1], ids[:, :9]):
                yield model(part, **{CACHE_KEYWORD: cache}).logits
            cache.check_integrity()
            cache.reset()

    with torch.no_grad():
        for got, want in zip(texts(fixed), texts(growing), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("attention", ["sdpa"])
def test_transformers_own_attention_reads_a_compiled_sealed_cache(attention: str) -> None:
    model = tiny_model("full", attention)
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, "int4", fixed=False), steps=20)
    got = logits_of(step, model, new_cache(model, "int4"), steps=20)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert counter.frame_count == 1


def test_generate_gives_the_tokens_of_a_growing_cache() -> None:
    model = tiny_model()
    want = generate(model, prompt(*PADDED), new_cache(model, "k4v2", fixed=False), max_new_tokens=24)
    got = generate(model, prompt(*PADDED), new_cache(model, "k4v2"), max_new_tokens=24, disable_compile=True)
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_token_past_the_capacity_is_refused_and_the_rest_is_kept() -> None:
    model, cache = tiny_model(), None
    cache = new_cache(model, "int4", 1)
    ids = prompt(ROW)["input_ids"]
    step, _ = compiled(model)
    model(ids[:, :-1], **{CACHE_KEYWORD: cache})
    step(ids[:, -1:], **{CACHE_KEYWORD: cache})
    for forward in (model, step):
        with pytest.raises(OutOfBlocks, match=f"1 more tokens a row were asked for: got {ROW} of {ROW} used"):
            forward(ids[:, :1], **{CACHE_KEYWORD: cache})
    assert int(cache.get_seq_length()) == ROW
    cache.check_integrity()


@torch.no_grad()
def test_rows_that_change_places_and_copies_are_refused_in_one_sentence() -> None:
    model = tiny_model()
    cache = new_cache(model, "int4")
    logits_of(model, model, cache, steps=1)
    with pytest.raises(CacheStateError, match="stay where they are: got the order"):
        cache.reorder_cache(torch.tensor([1, 0, 2]))
    with pytest.raises(CacheStateError, match="cannot be copied"):
        copy.deepcopy(cache)
    with pytest.raises(CacheStateError, match=r"holds 3 rows: got a batch of 1; free\(\)"):
        model(prompt(4)["input_ids"], **{CACHE_KEYWORD: cache})
