"""What a request is: a stream for threads and coroutines, with settings of its own that no neighbour changes."""

import asyncio
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_kvopt import Batcher, Request, TokenLogprob
from tests.batching.texts import PROMPTS, alone, model_of, text
from tests.helpers import VOCAB

MODEL = model_of("full")
ROOT = Path(__file__).parents[2]


def neighbours(batcher: Batcher) -> list[Request]:
    """Requests of all kinds, to be in the way."""
    return [
        batcher.submit(PROMPTS[4], max_new_tokens=9, do_sample=True, seed=3),
        batcher.submit(PROMPTS[0], max_new_tokens=15, do_sample=False, repetition_penalty=1.5),
        batcher.submit(PROMPTS[7], max_new_tokens=4, do_sample=True, temperature=0.3, seed=8),
    ]


def test_a_request_streams_its_tokens_one_by_one() -> None:
    with Batcher(MODEL) as batcher:
        request = batcher.submit(PROMPTS[0], max_new_tokens=10, do_sample=False)
        streamed = list(request)
        assert list(request) == streamed, "a second reader begins at the first token"
    assert streamed == request.result() == alone(MODEL, PROMPTS[0], max_new_tokens=10)
    assert (request.finish_reason, request.is_done) == ("length", True)


def test_many_threads_submit_and_wait() -> None:
    want = {length: alone(MODEL, text(length), max_new_tokens=6) for length in range(3, 19)}
    got: dict[int, list[int]] = {}
    with Batcher(MODEL, max_rows=5, prefill_chunk=11) as batcher:

        def ask(length: int) -> None:
            got[length] = batcher.submit(text(length), max_new_tokens=6, do_sample=False).result(60)

        threads = [threading.Thread(target=ask, args=(length,)) for length in want]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batcher.check_integrity()
    assert got == want


def test_coroutines_await_and_stream() -> None:
    async def both(batcher: Batcher) -> tuple[list[int], list[int], list[int]]:
        first = batcher.submit(PROMPTS[0], max_new_tokens=8, do_sample=False)
        second = batcher.submit(PROMPTS[2], max_new_tokens=8, do_sample=False)
        streamed = [token async for token in second]
        return await first, streamed, await first

    with Batcher(MODEL) as batcher:
        first, streamed, again = asyncio.run(both(batcher))
    assert first == again == alone(MODEL, PROMPTS[0], max_new_tokens=8)
    assert streamed == alone(MODEL, PROMPTS[2], max_new_tokens=8)


def test_sampled_tokens_are_those_of_the_seed_whoever_decodes_beside() -> None:
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 20}
    torch.manual_seed(17)
    want = alone(MODEL, PROMPTS[2], **settings)
    with Batcher(MODEL) as batcher:
        assert batcher.submit(PROMPTS[2], seed=17, **settings).result(60) == want
    with Batcher(MODEL, max_rows=4, prefill_chunk=7, max_tokens=16 * 12) as batcher:
        others = neighbours(batcher)
        request = batcher.submit(PROMPTS[2], seed=17, **settings)
        other = batcher.submit(PROMPTS[2], seed=18, **settings)
        assert request.result(60) == want
        assert other.result(60) != want
        assert all(one.result(60) for one in others)


def test_without_a_seed_every_request_draws_its_own() -> None:
    with Batcher(MODEL) as batcher:
        requests = batcher.submit_samples(PROMPTS[0], 3, do_sample=True, max_new_tokens=12)
        assert len({tuple(request.result(60)) for request in requests}) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, VOCAB, 2))},
        {"suppress_tokens": list(range(40))},
        {"forced_eos_token_id": 9},
        {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=list(range(50)))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_mean_what_they_mean_to_generate(settings: dict) -> None:
    want = [alone(MODEL, prompt, **settings) for prompt in PROMPTS[:3]]
    with Batcher(MODEL, prefill_chunk=16) as batcher:
        given = {"do_sample": False, "max_new_tokens": 12, **settings}
        if "generation_config" in settings:
            given = settings
            want = [alone(MODEL, prompt, do_sample=None, max_new_tokens=None, **settings) for prompt in PROMPTS[:3]]
        assert [batcher.submit(prompt, **given).result(60) for prompt in PROMPTS[:3]] == want


def test_without_settings_the_models_generation_config_counts() -> None:
    with Batcher(MODEL) as batcher:
        assert len(batcher.submit(PROMPTS[0]).result(60)) == 20


def test_an_end_token_ends_its_request_alone() -> None:
    plain = alone(MODEL, PROMPTS[0], max_new_tokens=20)
    end = plain[4]
    with Batcher(MODEL) as batcher:
        request = batcher.submit(PROMPTS[0], max_new_tokens=20, do_sample=False, eos_token_id=end)
        other = batcher.submit(PROMPTS[0], max_new_tokens=20, do_sample=False)
        assert request.result(60) == plain[: plain.index(end) + 1]
        assert request.finish_reason == "stop"
        assert other.result(60) == plain


def test_a_stop_string_ends_its_request() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "evals/reference_model/model")
    plain = alone(MODEL, PROMPTS[0], max_new_tokens=20)
    string = tokenizer.decode(plain[5:7])
    want = next(plain[: i + 1] for i in range(20) if string in tokenizer.decode(plain[: i + 1]))
    with Batcher(MODEL) as batcher:
        request = batcher.submit(
            PROMPTS[0], max_new_tokens=20, do_sample=False, stop_strings=string, tokenizer=tokenizer
        )
        config = GenerationConfig(max_new_tokens=20, do_sample=False, stop_strings=[string])
        other = batcher.submit(PROMPTS[0], generation_config=config, tokenizer=tokenizer)
        assert request.result(60) == other.result(60) == want
        assert request.finish_reason == "stop"


def test_a_stopping_criterion_is_shown_the_text_of_its_request() -> None:
    shown = []

    class AtFive(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            shown.append(input_ids[0].tolist())
            return torch.tensor([input_ids.shape[1] == len(PROMPTS[2]) + 5])

    with Batcher(MODEL) as batcher:
        others = neighbours(batcher)
        request = batcher.submit(PROMPTS[2], do_sample=False, stopping_criteria=StoppingCriteriaList([AtFive()]))
        want = alone(MODEL, PROMPTS[2], max_new_tokens=5)
        assert request.result(60) == want
        assert request.finish_reason == "stop"
        assert all(len(one.result(60)) > 0 for one in others)
    assert shown == [PROMPTS[2] + want[: i + 1] for i in range(5)]


def test_a_logits_processor_is_called_once_a_token_and_changes_its_request_alone() -> None:
    calls = []

    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            calls.append(input_ids.shape[1])
            return scores.masked_fill(torch.arange(VOCAB) != 42, -torch.inf)

    with Batcher(MODEL) as batcher:
        plain = batcher.submit(PROMPTS[2], do_sample=False, max_new_tokens=6)
        forced = batcher.submit(
            PROMPTS[2], do_sample=False, max_new_tokens=6, logits_processor=LogitsProcessorList([Only()])
        )
        assert forced.result(60) == [42] * 6
        assert plain.result(60) == alone(MODEL, PROMPTS[2], max_new_tokens=6)
    assert calls == list(range(len(PROMPTS[2]), len(PROMPTS[2]) + 6))


def test_log_probabilities_are_those_of_the_model() -> None:
    with Batcher(MODEL) as batcher:
        others = neighbours(batcher)
        request = batcher.submit(PROMPTS[2], do_sample=False, max_new_tokens=5, logprobs=3, repetition_penalty=2.0)
        tokens = request.result(60)
        none = others[1].result(60)
    ids = torch.tensor([PROMPTS[2] + tokens])
    with torch.no_grad():
        want = MODEL(ids).logits[0, len(PROMPTS[2]) - 1 : -1].log_softmax(-1)
    assert [told.token for told in request.logprobs] == tokens
    for told, row in zip(request.logprobs, want, strict=True):
        assert isinstance(told, TokenLogprob)
        assert math.isclose(told.logprob, row[told.token].item(), abs_tol=1e-4)
        assert [token for token, _ in told.top] == row.topk(3).indices.tolist()
        assert torch.allclose(torch.tensor([value for _, value in told.top]), row.topk(3).values, atol=1e-4)
    assert none
    assert others[1].logprobs == []


def test_a_cancelled_request_leaves_and_the_others_go_on() -> None:
    with Batcher(MODEL) as batcher:
        long = batcher.submit(PROMPTS[0], max_new_tokens=2000, do_sample=False)
        other = batcher.submit(PROMPTS[2], max_new_tokens=12, do_sample=False)
        stream = iter(long)
        first = [next(stream) for _ in range(3)]
        long.cancel()
        tokens = long.result(60)
        assert long.finish_reason == "cancelled"
        assert 3 <= len(tokens) < 2000
        assert tokens[:3] == first
        assert other.result(60) == alone(MODEL, PROMPTS[2])
        batcher.check_integrity()
        assert batcher.stats.decoding == batcher.stats.row_blocks == 0


def test_a_request_that_waits_can_be_cancelled() -> None:
    with Batcher(MODEL, max_rows=1) as batcher:
        running = batcher.submit(PROMPTS[0], max_new_tokens=60, do_sample=False)
        waiting = batcher.submit(PROMPTS[2], do_sample=False)
        waiting.cancel()
        assert waiting.result(60) == []
        assert waiting.finish_reason == "cancelled"
        assert not running.is_done
        assert len(running.result(60)) == 60


def test_a_time_limit_ends_a_request_that_decodes_or_waits() -> None:
    with Batcher(MODEL, max_rows=1) as batcher:
        running = batcher.submit(PROMPTS[0], max_new_tokens=5000, do_sample=False, max_time=0.4)
        waiting = batcher.submit(PROMPTS[2], do_sample=False, max_time=0.05)
        assert waiting.result(60) == []
        assert waiting.finish_reason == "time"
        assert 0 < len(running.result(60)) < 5000
        assert running.finish_reason == "time"
        assert running.stats.total_s < 5


def test_result_times_out_and_the_request_goes_on() -> None:
    with Batcher(MODEL) as batcher:
        request = batcher.submit(PROMPTS[0], max_new_tokens=60, do_sample=False)
        with pytest.raises(TimeoutError, match="goes on"):
            request.result(1e-4)
        assert len(request.result(60)) == 60


def test_priority_goes_first_and_nobody_is_overtaken_by_those_that_came_much_later() -> None:
    with Batcher(MODEL, max_rows=1) as batcher:
        batcher.submit(PROMPTS[0], max_new_tokens=60, do_sample=False)
        low = batcher.submit(PROMPTS[2], max_new_tokens=3, do_sample=False)
        high = batcher.submit(PROMPTS[3], max_new_tokens=3, do_sample=False, priority=5)
        high.result(60), low.result(60)
    assert high.finished_at < low.finished_at
    assert low.stats.queue_s > high.stats.queue_s


def test_stats_tell_times_and_tokens() -> None:
    with Batcher(MODEL) as batcher:
        request = batcher.submit(PROMPTS[4], max_new_tokens=5, do_sample=False)
        request.result(60)
        again = batcher.submit(PROMPTS[4], max_new_tokens=5, do_sample=False)
        again.result(60)
        stats = batcher.stats
    told = again.stats
    assert 0 <= told.queue_s <= told.first_token_s <= told.total_s
    assert (told.prompt_tokens, told.new_tokens, told.preemptions) == (70, 5, 0)
    assert (request.stats.cached_tokens, told.cached_tokens) == (0, 69)
    assert (stats.finished, stats.new_tokens, stats.cached_tokens) == (2, 10, 69)
    assert stats.computed_tokens == 70 + 4 + 1 + 4
    assert stats.tokens_per_s > 0


def test_namespaces_find_nothing_of_each_other() -> None:
    with Batcher(MODEL) as batcher:
        tokens = []
        for namespace in ("a", "b", "a"):
            request = batcher.submit(PROMPTS[4], max_new_tokens=5, do_sample=False, namespace=namespace)
            tokens.append(request.result(60))
            assert request.stats.cached_tokens == (69 if namespace == "a" and len(tokens) == 3 else 0)
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_batcher_that_nobody_holds_ends_with_its_last_request() -> None:
    before = threading.active_count()
    request = Batcher(MODEL).submit(PROMPTS[0], max_new_tokens=5, do_sample=False)
    assert len(request.result(60)) == 5
    assert threading.active_count() == before + 1
    del request
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
