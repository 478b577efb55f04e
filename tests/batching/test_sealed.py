"""Rows whose full blocks are sealed: those that join, give way and are found again read what a lone text reads."""

from functools import cache

import pytest

from hf_kvopt import CACHE_KEYWORD, Batcher, QuantizedPagedCache
from hf_kvopt.quant import KV_FORMATS
from tests.batching.test_equality import TIGHT
from tests.batching.texts import PROMPTS, SPECS, alone, model_of, submit_all, text
from tests.helpers import tiny_model

SEALED = [name for name, fmt in KV_FORMATS.items() if fmt.sealed is not None]
SIZE = 16  # prompts of several blocks
COMMON = text(70, seed=9)


def lone(kind: str, format: str, prompt: list[int], new: int) -> list[int]:
    """Tokens of `generate()` on one prompt, with a cache of this format."""
    model = model_of(kind)
    cache = QuantizedPagedCache(model.config, format=format, block_size=SIZE)
    return alone(model, prompt, max_new_tokens=new, **{CACHE_KEYWORD: cache})


@cache
def expected(kind: str, format: str) -> list[list[int]]:
    return [lone(kind, format, prompt, new) for prompt, (_, new) in zip(PROMPTS, SPECS, strict=True)]


@pytest.mark.parametrize("draft", [None, "prompt_lookup"], ids=["plain", "drafts"])
@pytest.mark.parametrize("pressure", ["three rows", "fourteen blocks", "ten blocks, nothing shared"])
@pytest.mark.parametrize("format", SEALED)
def test_tokens_are_those_of_each_prompt_alone(format: str, pressure: str, draft: str | None) -> None:
    with Batcher(model_of("full"), format, block_size=SIZE, draft=draft, **TIGHT[pressure]) as batcher:
        tokens = [request.result(60) for request in submit_all(batcher)]
        batcher.check_integrity()
        assert batcher.stats.row_blocks == 0
        assert draft is not None or (batcher.stats.preemptions > 0) == ("max_tokens" in TIGHT[pressure])
    assert tokens == expected("full", format)


def test_sealed_layers_beside_sliding_ones() -> None:
    with Batcher(model_of("mixed"), SEALED[0], block_size=SIZE, **TIGHT["fourteen blocks"]) as batcher:
        assert [request.result(60) for request in submit_all(batcher)] == expected("mixed", SEALED[0])


def test_a_text_is_gone_on_from_where_its_newest_blocks_are_whole() -> None:
    """What a row leaves behind serves the next turn, and a system prompt those that begin with it."""
    model = model_of("full")
    with Batcher(model, SEALED[0], block_size=SIZE) as batcher:
        first = batcher.submit(COMMON, max_new_tokens=20, do_sample=False).result(60)
        turn = [*COMMON, *first, *text(9)]
        again = batcher.submit(turn, max_new_tokens=10, do_sample=False)
        assert again.result(60) == lone("full", SEALED[0], turn, 10)
        assert again.stats.cached_tokens == len(COMMON) + len(first) - 1
        forks = [[*COMMON[:50], *text(30, seed=i)] for i in range(3)]
        for fork in forks:  # the second one marks where they part, the third one begins there
            request = batcher.submit(fork, max_new_tokens=10, do_sample=False)
            assert request.result(60) == lone("full", SEALED[0], fork, 10)
        assert request.stats.cached_tokens >= 48
        batcher.check_integrity()


def test_samples_of_a_prompt_share_its_blocks() -> None:
    with Batcher(tiny_model("full"), SEALED[0], block_size=SIZE) as batcher:
        requests = batcher.submit_samples(COMMON, 3, max_new_tokens=12, do_sample=False)
        tokens = [request.result(60) for request in requests]
        assert requests[2].stats.cached_tokens >= 64
    assert tokens == [lone("full", SEALED[0], COMMON, 12)] * 3
