"""`enable(model, batching=True)`: transformers' own `generate_batch` over our blocks, formats and prefixes."""

import asyncio

import pytest
from transformers import GenerationConfig

import hf_kvopt
from hf_kvopt import CACHE_KEYWORD, BatchConfig, QuantizedPagedCache, UnsupportedModel
from hf_kvopt.batching.manager import BatchManager
from tests.batching.texts import PROMPTS, alone, model_of
from tests.helpers import tiny_model
from tests.models.cases import covered_cases
from tests.models.tiny import build

WANT = [alone(model_of("full"), prompt, max_new_tokens=6) for prompt in PROMPTS]
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6)


def lossy(prompt: list[int], format: str) -> list[int]:
    cache = QuantizedPagedCache(model_of("full").config, format=format)
    return alone(model_of("full"), prompt, max_new_tokens=6, **{CACHE_KEYWORD: cache})


def tokens_of(outputs: dict) -> list[list[int]]:
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("cache", ["paged", "int8"])
def test_generate_batch_gives_the_tokens_of_each_prompt(cache: str) -> None:
    model = hf_kvopt.enable(tiny_model("full", "eager"), cache=cache, batching=True)
    outputs = model.generate_batch(inputs=PROMPTS, generation_config=GREEDY)
    assert tokens_of(outputs) == (WANT if cache == "paged" else [lossy(prompt, cache) for prompt in PROMPTS])
    assert list(outputs) == [f"req_{i}" for i in range(len(PROMPTS))]
    assert [output.prompt_ids for output in outputs.values()] == PROMPTS
    hf_kvopt.disable(model)
    assert "init_continuous_batching" not in vars(model)
    assert model.config._attn_implementation == "eager"


def test_plain_generate_goes_on_beside_it() -> None:
    model = hf_kvopt.enable(tiny_model("full"), batching=BatchConfig(max_rows=3, prefill_chunk=16))
    model.generate_batch(inputs=PROMPTS[:2], generation_config=GREEDY)
    assert alone(model, PROMPTS[0], max_new_tokens=6) == WANT[0]


def test_samples_of_a_prompt_come_as_children() -> None:
    model = hf_kvopt.enable(tiny_model("full"), batching=True)
    config = GenerationConfig(do_sample=True, max_new_tokens=6, num_return_sequences=3)
    outputs = model.generate_batch(inputs=PROMPTS[:2], generation_config=config)
    assert list(outputs) == [f"req_{i}{child}" for i in (0, 1) for child in ("__child#0", "__child#1", "")]
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 6


def test_a_manager_that_is_kept_finds_texts_again() -> None:
    model = hf_kvopt.enable(tiny_model("full"), batching=True)
    for _ in range(2):
        outputs = model.generate_batch(inputs=PROMPTS[4:5], generation_config=GREEDY, persistent_manager=True)
        assert tokens_of(outputs) == WANT[4:5]
    manager = model.init_continuous_batching()
    assert isinstance(manager, BatchManager)
    assert manager.batcher.stats.cached_tokens == 69
    batcher = manager.batcher
    hf_kvopt.disable(model)
    assert batcher.is_closed


def test_one_bad_prompt_fails_alone() -> None:
    model = hf_kvopt.enable(tiny_model("full"), batching=True, max_tokens=16 * 8)
    outputs = model.generate_batch(inputs=[PROMPTS[0], [], [5] * 200, PROMPTS[2]], generation_config=GREEDY)
    errors = [output.error for output in outputs.values()]
    assert errors[0] is errors[3] is None
    assert "at least one token" in errors[1]
    assert "raise max_tokens" in errors[2]
    assert [tokens_of(outputs)[i] for i in (0, 3)] == [WANT[0], WANT[2]]


def test_handlers_stream_and_requests_are_cancelled() -> None:
    model = hf_kvopt.enable(tiny_model("full"), batching=True)

    async def talk(manager: BatchManager) -> tuple[list, list]:
        done, streamed, cancelled = asyncio.Event(), [], []

        def on_token(output) -> None:
            streamed.append(output)
            if output.is_finished():
                done.set()

        manager.register_result_handler("mine", on_token)
        manager.register_result_handler("long", cancelled.append)
        manager.add_request(PROMPTS[0], request_id="long", max_new_tokens=5000)
        manager.add_request(PROMPTS[2], request_id="mine", max_new_tokens=6, streaming=True)
        await asyncio.wait_for(done.wait(), 60)
        manager.cancel_request("long")
        while not cancelled:
            await asyncio.sleep(0.01)
        return streamed, cancelled

    manager = model.init_continuous_batching(generation_config=GREEDY)
    manager.start()
    streamed, cancelled = asyncio.run(talk(manager))
    manager.stop()
    assert [output.generated_tokens for output in streamed][-1] == WANT[2]
    assert [len(output.generated_tokens) for output in streamed] == sorted(
        len(output.generated_tokens) for output in streamed
    )
    assert len(cancelled) == 1
    assert 0 < len(cancelled[0].generated_tokens) < 5000
    assert manager.fatal_error is None
    assert not manager.is_running()


def test_a_worker_that_fails_is_told_to_all() -> None:
    model = hf_kvopt.enable(tiny_model("full"), batching=True)
    manager = model.init_continuous_batching(generation_config=GREEDY)
    manager.start()
    model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    manager.add_request(PROMPTS[0])
    output = manager.get_result(timeout=60)
    assert "ZeroDivisionError" in output.error
    assert isinstance(manager.background_thread_status.fatal_error, ZeroDivisionError)
    assert not manager.is_running()
    manager.add_request(PROMPTS[0], request_id="late")
    assert "was stopped" in manager.get_result(timeout=60).error


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cache": None}, ValueError, "batching needs a cache"),
        ({"compileable": True, "max_tokens": 64}, TypeError, r"got \['compileable'\] too"),
        ({"batching": BatchConfig(cache="int8")}, ValueError, "name them once"),
    ],
)
def test_what_does_not_go_together(options: dict, error: type[Exception], words: str) -> None:
    model = tiny_model("full", "eager")
    with pytest.raises(error, match=words):
        hf_kvopt.enable(model, **{"batching": True, **options})
    assert hf_kvopt.enabled(model) is None


def test_a_model_that_cannot_be_packed_is_refused_by_enable() -> None:
    model = build(next(case for case in covered_cases() if case.name == "qwen3_next"), "eager")
    with pytest.raises(UnsupportedModel, match="cannot be batched continuously"):
        hf_kvopt.enable(model, batching=True)
