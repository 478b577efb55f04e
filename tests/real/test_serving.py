"""SmolLM2 behind the server: its chat template, sixteen streaming clients, and some that hang up; `pytest -m real`."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt
from tests.cli.test_serve import Live

pytestmark = pytest.mark.real
QUESTIONS = [f"What is {i} plus {i + 3}?" for i in range(16)]
NEW = 10


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    live = Live(Path(hf_kvopt.model_source("smollm2")), "--max-tokens", "8k", "--max-rows", "16")
    yield live
    assert live.close() == 0


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What plain transformers answers each question alone."""
    source = hf_kvopt.model_source("smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    found = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        found.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def stream(server: Live, question: str, max_tokens: int = NEW) -> Any:
    client = server.client.with_options(timeout=300)
    return client.chat.completions.create(
        model=server.model, messages=messages(question), max_tokens=max_tokens, temperature=0, stream=True
    )


def answer(server: Live, question: str) -> str:
    parts = stream(server, question)
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def test_sixteen_clients_stream_what_each_is_answered_alone(server: Live, answers: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(lambda question: answer(server, question), QUESTIONS))
    assert told == answers
    counts = server.metrics()
    assert counts["finished"] == 16
    assert counts["steps"] < 16 * NEW, "requests were not decoded together"
    assert counts["cached_tokens"] > 0, "the system prompt of the template was read more than once"
    assert counts["row_blocks"] == 0


def test_clients_that_hang_up_leave_the_others_alone(server: Live, answers: list[str]) -> None:
    before = server.metrics()["finished"]
    leaving = [stream(server, f"Tell me a long story about {thing}.", 400) for thing in ("rivers", "stars")]
    for parts in leaving:
        next(iter(parts))
    with ThreadPoolExecutor(4) as pool:
        told = [pool.submit(answer, server, question) for question in QUESTIONS[:4]]
        for parts in leaving:
            parts.close()
        assert [one.result() for one in told] == answers[:4]
    deadline = time.monotonic() + 120
    while server.metrics()["finished"] < before + 6:
        assert time.monotonic() < deadline, "a request goes on for nobody"
        time.sleep(0.2)
    assert server.metrics()["row_blocks"] == 0


def test_a_conversation_that_can_never_fit_is_told_so(server: Live) -> None:
    status, said = server.post(
        "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9000}'
    )
    assert status == 400
    assert "raise max_tokens" in said
