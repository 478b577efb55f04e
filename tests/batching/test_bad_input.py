"""Bad input is refused where it is given, with the reason; a failure hits those it concerns and leaks no block."""

import logging
import threading
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

from hf_kvopt import ATTENTION_NAME, Batcher, CacheStateError, UnsupportedModel, compat, disable, enable, generate_many
from hf_kvopt.batching import settings as batch_settings
from tests.attention.models import case_named
from tests.batching.texts import PROMPTS, alone, model_of, text
from tests.helpers import VOCAB, tiny_model
from tests.models.tiny import build

MODEL = model_of("full")


@pytest.fixture
def batcher():
    with Batcher(MODEL, max_tokens=16 * 6) as made:
        yield made


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"cache": "int5"}, ValueError, "unknown cache 'int5'.*did you mean 'int"),
        ({"max_rows": 0}, ValueError, "max_rows must be an integer of at least 1: got 0"),
        ({"prefill_chunk": 2.5}, ValueError, "prefill_chunk must be an integer"),
        ({"max_tokens": "many"}, ValueError, "max_tokens"),
        ({"block_size": 17}, ValueError, "block_size must be a power of two"),
        ({"rows": 3}, TypeError, "rows"),
    ],
)
def test_settings_that_cannot_work(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Batcher(MODEL, **settings)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], ValueError, "at least one token: got none"),
        (torch.empty(0, dtype=torch.long), ValueError, "got none"),
        (torch.ones(2, 3, dtype=torch.long), ValueError, r"one prompt.*got ids of shape \[2, 3\]"),
        ([0.5, 1.0], TypeError, "token ids: got torch.float"),
        ("a text", TypeError, "got text; pass tokenizer"),
        ([[1, 2], [3]], TypeError, "token ids"),
        (None, TypeError, "NoneType"),
        ([3, VOCAB], ValueError, f"from 0 to {VOCAB - 1}: got 3 to {VOCAB}"),
        ([-1, 3], ValueError, "got -1 to 3"),
    ],
)
def test_prompts_that_are_none(batcher: Batcher, prompt: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        batcher.submit(prompt)  # type: ignore[arg-type]
    assert len(batcher.submit(PROMPTS[0], max_new_tokens=3).result(60)) == 3


def test_a_prompt_that_can_never_fit_is_refused_with_the_arithmetic(batcher: Batcher) -> None:
    words = "90 tokens with up to 5 new ones takes 7 blocks of 16.*got max_tokens=96, which is 6 blocks; raise.* 112"
    with pytest.raises(ValueError, match=words):
        batcher.submit(text(90), max_new_tokens=5)
    assert len(batcher.submit(text(76), max_new_tokens=5).result(60)) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2}, "beam_search; use model.generate"),
        ({"num_return_sequences": 2, "do_sample": True}, "use submit_samples"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores, return_dict_in_generate.*logprobs="),
        ({"use_cache": False}, "use_cache=False"),
        ({"attention_mask": torch.ones(1, 5)}, "got attention_mask"),
        ({"streamer": object()}, "iterate over the request"),
        ({"stop_strings": "end"}, "pass tokenizer="),
        ({"logprobs": -1}, "logprobs must be a number"),
        ({"max_new_token": 3}, "max_new_token"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_generate_that_make_no_request(batcher: Batcher, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batcher.submit(PROMPTS[0], **settings)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_samples_are_counted(batcher: Batcher, n: Any) -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        batcher.submit_samples(PROMPTS[0], n)
    for call in (lambda **options: generate_many(MODEL, PROMPTS, **options), partial(batcher.submit, PROMPTS[0])):
        with pytest.raises(ValueError, match="num_return_sequences must be an integer of at least 1"):
            call(num_return_sequences=n)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"max_new_tokens": "5"}, TypeError, "max_new_tokens must be an integer: got '5'"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer: got 2.5"),
        ({"min_new_tokens": True}, TypeError, "min_new_tokens must be an integer: got True"),
        ({"generation_config": GenerationConfig(max_length=2.5)}, TypeError, "max_length must be an integer"),
        (
            {"generation_config": {"do_sample": False}},
            TypeError,
            "must be a GenerationConfig.*got dict",
        ),
        ({"max_time": "soon"}, TypeError, "max_time must be a number of seconds: got 'soon'"),
        ({"eos_token_id": "a"}, TypeError, "could not read the settings.*eos_token_id='a'"),
        ({"logits_processor": 5}, TypeError, "could not read the settings.*logits_processor=5"),
        ({"seed": "x"}, TypeError, "seed must be an integer, or None to draw one: got 'x'"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must fit in 64 bits"),
    ],
    ids=lambda value: str(next(iter(value.items())))[:40] if isinstance(value, dict) else "",
)
def test_settings_that_python_would_word_are_named(
    batcher: Batcher, settings: dict, error: type[Exception], words: str
) -> None:
    for call in (lambda **options: generate_many(MODEL, PROMPTS, **options), partial(batcher.submit, PROMPTS[0])):
        with pytest.raises(error, match=words):
            call(**settings)
    if "seed" in settings:
        with pytest.raises(error, match=words):
            batcher.submit_samples(PROMPTS[0], 2, **settings)


def test_a_prompt_that_generate_would_heal_is_refused(batcher: Batcher) -> None:
    class Heals:
        """Tokenizer enough for `heal_tokens`, which is replaced below."""

    heal = lambda ids, tokenizer: ids + 1  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(MODEL), "heal_tokens", lambda self, ids, tokenizer=None: heal(ids, tokenizer))
        with pytest.raises(ValueError, match="changes the prompt, such as token_healing"):
            batcher.submit([1, 2, 3], token_healing=True, tokenizer=Heals())


@pytest.mark.parametrize("kind", ["full", "mla"])
@pytest.mark.parametrize("beside", ["batcher", "enable"])
def test_our_attention_stays_as_long_as_anyone_uses_it(kind: str, beside: str) -> None:
    model = tiny_model("full", "sdpa") if kind == "full" else build(case_named("deepseek_v3"), "sdpa")
    expected = [alone(model, prompt, max_new_tokens=6) for prompt in PROMPTS[:2]]
    with Batcher(model) as batcher:
        assert batcher.submit(PROMPTS[0], max_new_tokens=6, do_sample=False).result(60) == expected[0]
        if beside == "batcher":
            Batcher(model).close()
        else:
            disable(enable(model))
        assert batcher.submit(PROMPTS[1], max_new_tokens=6, do_sample=False).result(60) == expected[1]
        enable(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    with Batcher(model) as batcher:
        batcher.close()
        batcher.close()
    assert model.config._attn_implementation == ATTENTION_NAME, "enable still uses it"
    disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(compat.EXPAND_KV in module.__dict__ for module in model.modules())


def test_a_batcher_that_cannot_be_made_changes_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: object) -> None:
        raise UnsupportedModel("no")

    model = tiny_model("full", "sdpa")
    monkeypatch.setattr(batch_settings, "require_equal", fails)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="no"):
            Batcher(model)
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="training mode"):
        Batcher(model.train())
    assert model.config._attn_implementation == "sdpa"


def test_what_is_no_model_and_what_trains() -> None:
    with pytest.raises(TypeError, match="takes a transformers model: got Linear"):
        Batcher(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"training mode; call model.eval"):
        Batcher(tiny_model("full").train())


def test_a_model_that_begins_to_train_ends_the_batch() -> None:
    model = tiny_model("full")
    batcher = Batcher(model)
    request = batcher.submit(PROMPTS[0], max_new_tokens=5000, do_sample=False)
    next(iter(request))
    model.train()
    with pytest.raises(CacheStateError, match="training mode"):
        request.result(60)
    with pytest.raises(CacheStateError, match="training mode"):
        batcher.submit(PROMPTS[0])


def test_a_closed_batcher_takes_nothing_more() -> None:
    batcher = Batcher(MODEL)
    request = batcher.submit(PROMPTS[0], max_new_tokens=30, do_sample=False)
    batcher.close()
    assert len(request.result()) == 30, "what was submitted is finished"
    batcher.close()
    assert batcher.is_closed
    with pytest.raises(CacheStateError, match="closed: got another request; make a new Batcher"):
        batcher.submit(PROMPTS[0])


def test_closing_can_cancel_and_frees_all_memory() -> None:
    batcher = Batcher(MODEL, max_rows=1)
    running = batcher.submit(PROMPTS[0], max_new_tokens=5000, do_sample=False)
    waiting = batcher.submit(PROMPTS[2])
    next(iter(running))
    batcher.close(cancel=True)
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert batcher.stats.num_blocks == 0


class Fails(LogitsProcessor):
    """Raises at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            raise ZeroDivisionError("mine")
        return scores


@pytest.mark.parametrize("num_good", [0, 4], ids=["at the first token", "while decoding"])
def test_an_error_in_a_processor_fails_its_request_alone(num_good: int) -> None:
    failing = LogitsProcessorList([Fails(len(PROMPTS[2]) + num_good)])
    with Batcher(MODEL, prefill_chunk=16) as batcher:
        before = batcher.submit(PROMPTS[0], max_new_tokens=12, do_sample=False)
        request = batcher.submit(PROMPTS[2], do_sample=False, logits_processor=failing)
        after = batcher.submit(PROMPTS[1], max_new_tokens=12, do_sample=False)
        with pytest.raises(ZeroDivisionError, match="mine"):
            request.result(60)
        assert request.finish_reason == "error"
        assert request.tokens == alone(MODEL, PROMPTS[2])[:num_good]
        assert before.result(60) == alone(MODEL, PROMPTS[0])
        assert after.result(60) == alone(MODEL, PROMPTS[1])
        batcher.check_integrity()
        assert batcher.stats.row_blocks == 0


def test_a_worker_that_fails_tells_everybody(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("full")
    batcher = Batcher(model, max_rows=2)
    requests = [batcher.submit(prompt, max_new_tokens=5000, do_sample=False) for prompt in PROMPTS[:4]]
    next(iter(requests[0]))
    with caplog.at_level(logging.CRITICAL):
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        for request in requests:
            with pytest.raises(ZeroDivisionError):
                request.result(60)
    hook.remove()
    with pytest.raises(CacheStateError, match="because its worker failed: ZeroDivisionError"):
        batcher.submit(PROMPTS[0])
    assert batcher.stats.num_blocks == 0
    with pytest.raises(ZeroDivisionError):
        for _ in requests[1]:
            pass
    assert generate_many(model, PROMPTS[:1], max_new_tokens=5, do_sample=False)


def test_an_interrupt_ends_generate_many_and_leaves_the_model_usable() -> None:
    model = tiny_model("full", "eager")
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_many(model, PROMPTS, max_new_tokens=9, do_sample=False)
    hook.remove()
    assert model.config._attn_implementation == "eager"
    assert alone(model, PROMPTS[0]) == alone(MODEL, PROMPTS[0])


def test_an_error_in_a_with_block_cancels() -> None:
    batcher = Batcher(MODEL)
    request = batcher.submit(PROMPTS[0], max_new_tokens=5000, do_sample=False)

    def interrupted() -> None:
        with batcher:
            next(iter(request))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert request.finish_reason == "cancelled"
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_kvopt batcher" and thread.is_alive()]


def test_weights_that_change_between_requests_are_seen() -> None:
    model = tiny_model("full")
    with Batcher(model) as batcher:
        first = batcher.submit(PROMPTS[4], max_new_tokens=5, do_sample=False).result(60)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        request = batcher.submit(PROMPTS[4], max_new_tokens=5, do_sample=False)
        assert request.result(60) == alone(model, PROMPTS[4], max_new_tokens=5) != first
        assert request.stats.cached_tokens == 0


def test_a_table_of_positions_bounds_the_text() -> None:
    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, **none)).eval()
    with Batcher(model) as batcher:
        with pytest.raises(ValueError, match="table of 32 positions: got a prompt of 32 tokens"):
            batcher.submit(text(32))
        request = batcher.submit(text(20), max_new_tokens=50, do_sample=False)
        assert len(request.result(60)) == 12
        assert request.finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"labels": torch.zeros(1, 5)}, ValueError, "token ids alone: got labels"),
        ({"logprobs": VOCAB + 1}, ValueError, f"up to {VOCAB}"),
        ({"priority": float("nan")}, ValueError, "priority must be a finite number"),
        ({"priority": "high"}, ValueError, "priority must be a finite number"),
        ({"namespace": ["a"]}, TypeError, "a namespace must be hashable"),
    ],
    ids=["read beside", "logprobs", "nan", "text", "namespace"],
)
def test_what_would_be_ignored_or_hit_others_is_refused(
    batcher: Batcher, settings: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        batcher.submit(PROMPTS[0], **settings)
    assert len(batcher.submit(PROMPTS[0], max_new_tokens=3).result(60)) == 3


def test_scores_of_another_size_fail_their_request_alone(batcher: Batcher) -> None:
    def widen(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([scores, torch.full((1, 9), 1e4)], dim=1)

    request = batcher.submit(PROMPTS[0], max_new_tokens=5, logits_processor=LogitsProcessorList([widen]))
    with pytest.raises(ValueError, match="one row of"):
        request.result(60)
    assert len(batcher.submit(PROMPTS[0], max_new_tokens=3).result(60)) == 3


def test_a_listener_that_raises_ends_nothing(batcher: Batcher, caplog: pytest.LogCaptureFixture) -> None:
    request = batcher.submit(PROMPTS[0], max_new_tokens=5, do_sample=False)
    request.on_change(lambda: 1 // 0)
    assert len(request.result(60)) == 5
    assert len(batcher.submit(PROMPTS[0], max_new_tokens=3).result(60)) == 3


def test_a_processor_that_writes_in_place_does_not_change_log_probabilities(batcher: Batcher) -> None:
    def forbid(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :50] = -1e9
        return scores

    settings = {"max_new_tokens": 1, "do_sample": False, "logprobs": 2}
    plain = batcher.submit(PROMPTS[0], **settings)
    forbidden = batcher.submit(PROMPTS[0], logits_processor=LogitsProcessorList([forbid]), **settings)
    plain.result(60), forbidden.result(60)
    assert forbidden.logprobs[0].top == plain.logprobs[0].top
