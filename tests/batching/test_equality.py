"""Greedy tokens of a batch are those of each prompt alone, whatever joins, leaves, gives way or is found again."""

import pytest

from hf_kvopt import Batcher, BatchStats, generate_many
from tests.batching.texts import BLOCK, FORMATS, PROMPTS, SPECS, alone, expected, model_of, submit_all
from tests.helpers import KINDS, tiny_model

TIGHT = {
    "wide": {"max_rows": 8, "prefill_chunk": 64},
    "three rows": {"max_rows": 3, "prefill_chunk": 16},
    "fourteen blocks": {"max_rows": 8, "prefill_chunk": 32, "max_tokens": 16 * 14},
    "ten blocks, nothing shared": {"max_rows": 8, "prefill_chunk": 24, "max_tokens": 16 * 10, "prefix_sharing": False},
}


def run(kind: str, cache: str, **settings) -> tuple[list[list[int]], BatchStats]:
    batcher = Batcher(model_of(kind), cache, **{"block_size": BLOCK, **settings})
    requests = submit_all(batcher)
    tokens = [request.result(60) for request in requests]
    batcher.check_integrity()
    stats = batcher.stats
    batcher.close()
    assert stats.row_blocks == 0, "blocks are still held by requests that are done"
    assert stats.finished == len(PROMPTS)
    assert stats.new_tokens == sum(map(len, tokens))
    return tokens, stats


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_each_prompt_alone(kind: str, format: str) -> None:
    tokens, _ = run(kind, format, **TIGHT["three rows"])
    assert tokens == expected(kind, format)


@pytest.mark.parametrize("pressure", TIGHT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["paged", "int4"])
def test_tokens_stay_the_same_under_pressure(format: str, kind: str, pressure: str) -> None:
    tokens, stats = run(kind, format, **TIGHT[pressure])
    assert tokens == expected(kind, format)
    if kind == "full":  # sliding rows may give blocks back instead
        assert (stats.preemptions > 0) == ("max_tokens" in TIGHT[pressure])


@pytest.mark.parametrize(("format", "common"), [("int4/int4", 37), ("int4", 16)])
def test_a_preempted_row_goes_on_from_what_survived_in_int4(format: str, common: int) -> None:
    tokens, stats = run("full", format, **TIGHT["fourteen blocks"])
    assert tokens == expected("full", format)
    assert stats.preemptions
    # The common beginning, of which sealed rows go on from a whole block, and what was computed before a row gave way.
    assert stats.cached_tokens > common


def test_no_token_is_padding_and_common_beginnings_are_computed_once() -> None:
    _, stats = run("full", "paged", **TIGHT["wide"])
    fed = sum(length + new - 1 for length, new in SPECS)
    assert stats.computed_tokens == fed - stats.cached_tokens
    assert stats.cached_tokens >= 32


def test_a_prompt_waits_for_one_that_begins_alike_in_the_very_batch() -> None:
    model, prompt = model_of("full"), PROMPTS[4]
    with Batcher(model, max_rows=8, prefill_chunk=16) as batcher:
        requests = batcher.submit_samples(prompt, 4, do_sample=False, max_new_tokens=5)
        tokens = [request.result(60) for request in requests]
        stats = batcher.stats
    assert tokens == [alone(model, prompt, max_new_tokens=5)] * 4
    # Whole blocks are shared, the rest of the last one is read by each.
    rest = len(prompt) - len(prompt) // 16 * 16
    assert stats.computed_tokens == len(prompt) + 3 * rest + 4 * 4


def test_requests_that_come_later_join_the_running_batch() -> None:
    model = model_of("mixed")
    with Batcher(model, max_rows=4, prefill_chunk=16) as batcher:
        first = batcher.submit(PROMPTS[6], max_new_tokens=40, do_sample=False)
        stream = iter(first)
        for _ in range(5):
            next(stream)
        second = batcher.submit(PROMPTS[2], max_new_tokens=21, do_sample=False)
        assert second.result(60) == expected("mixed", "paged")[2]
        assert first.result(60) == expected("mixed", "paged")[6]
        assert batcher.stats.steps < 40 + 21


def test_generate_many_keeps_the_order_and_gives_the_model_back() -> None:
    model = tiny_model("full", "eager")
    tokens = generate_many(model, iter(PROMPTS), max_rows=3, prefill_chunk=20, max_new_tokens=7, do_sample=False)
    assert tokens == [alone(model, prompt, max_new_tokens=7) for prompt in PROMPTS]
    assert model.config._attn_implementation == "eager"


def test_generate_many_takes_no_prompts_and_samples_of_each() -> None:
    model = model_of("full")
    assert generate_many(model, []) == []
    pairs = generate_many(
        model, PROMPTS[:2], num_return_sequences=2, do_sample=True, max_new_tokens=6, seed=5, max_rows=2
    )
    again = generate_many(
        model, PROMPTS[:2], num_return_sequences=2, do_sample=True, max_new_tokens=6, seed=5, max_rows=4
    )
    assert len(pairs) == 4
    assert pairs == again
    assert pairs[0] != pairs[1]


@pytest.mark.parametrize("kind", ["sliding", "mixed"])
def test_sliding_rows_give_blocks_back_and_are_found_again_where_they_are_whole(kind: str) -> None:
    model, prompt = model_of(kind), PROMPTS[2]
    with Batcher(model, prefill_chunk=16, prefix_sharing=False) as batcher:
        request = batcher.submit(prompt, max_new_tokens=120, do_sample=False)
        short = batcher.submit(PROMPTS[3], max_new_tokens=100, do_sample=False)
        stream = iter(request)
        for _ in range(110):
            next(stream)
        sliding = batcher._worker.runtime.engine.store.blocks._allocators[20]
        assert sliding.num_blocks - sliding.num_free <= 2 * 3 + 1, "a window of 20 takes 2 or 3 blocks, and one hole"
        assert request.result(60) == alone(model, prompt, max_new_tokens=120)
        assert short.result(60) == alone(model, PROMPTS[3], max_new_tokens=100)
    with Batcher(model, prefill_chunk=16) as batcher:
        first = batcher.submit(prompt, max_new_tokens=120, do_sample=False).result(60)
        again = batcher.submit(prompt + first[:60], max_new_tokens=20, do_sample=False)
        assert again.result(60) == first[60:80]
        # The prompt's blocks are known; what was generated had lost its first ones.
        assert again.stats.cached_tokens == 16
        batcher.check_integrity()
