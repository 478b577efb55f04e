"""A live server on the loopback, asked by the openai client: what it answers, refuses, counts, and how it ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_kvopt.__main__ import main

openai = pytest.importorskip("openai", reason="pip install 'hf-kvopt[serving]'")

ROOT = Path(__file__).parents[2]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = "def add(a, b):\n    return"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Live:
    """A server process."""

    def __init__(self, model: Path, *options: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "hf_kvopt", "serve", str(model), "--host", "127.0.0.1", "--device", "cpu"]
        command += ["--port", str(self.port), "--dtype", "float32", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        deadline = time.monotonic() + 120
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.2)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
        self.model = str(model)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics")[1].splitlines()
        return {name.removeprefix("hf_kvopt_"): float(value) for name, value in map(str.split, lines)}

    def complete(self, prompt: str = PROMPT, **options: object) -> str:
        options = {"max_tokens": 12, "temperature": 0, **options}
        return self.client.completions.create(model=self.model, prompt=prompt, **options).choices[0].text

    def close(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(ROOT / "evals/reference_model/model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Live]:
    live = Live(
        model,
        "--cache",
        "int8",
        "--draft",
        "prompt_lookup",
        "--max-tokens",
        "4k",
        "--max-rows",
        "8",
        "--host-tier",
        "64MiB",
    )
    yield live
    assert live.close() == 0


def test_completions_and_streams_say_the_same(server: Live) -> None:
    whole = server.complete()
    stream = server.client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in stream if part.choices) == whole
    assert whole


def test_chats_go_through_the_template(server: Live) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == server.complete(PROMPT)
    assert answer.usage.completion_tokens == 12
    stream = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=12, temperature=0, stream=True
    )
    parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert "".join(parts) == answer.choices[0].message.content


def test_a_stop_string_ends_a_chat(server: Live) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    whole = server.complete(PROMPT)
    stop = whole[4:7]
    answer = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=12, temperature=0, stop=[stop]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)] + stop
    assert answer.choices[0].finish_reason == "stop"


def test_sixteen_clients_at_once_get_what_each_gets_alone(server: Live) -> None:
    prompts = [f"def function_{i}(x):\n    return x +" for i in range(16)]
    alone = [server.complete(prompt) for prompt in prompts]
    steps = server.metrics()["steps"]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(server.complete, prompts)) == alone
    assert server.metrics()["steps"] - steps < 16 * 12


def test_each_request_keeps_its_temperature_and_seed(server: Live) -> None:
    greedy = server.complete()
    first = server.complete(temperature=1.3, seed=5)
    assert server.complete(temperature=1.3, seed=5) == first
    assert len({server.complete(temperature=1.3, seed=seed) for seed in range(4)}) > 1
    assert server.complete() == greedy


@pytest.mark.parametrize("streams", [True, False], ids=["streaming", "waiting"])
def test_a_client_that_hangs_up_is_forgotten(server: Live, streams: bool) -> None:
    before = server.metrics()["finished"]
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 3500, "stream": streams, "temperature": 0}
    text = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(text)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + text)
        deadline = time.monotonic() + 30
        while not server.metrics()["decoding"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    while server.metrics()["decoding"]:
        assert time.monotonic() < deadline, "the request goes on for nobody"
        time.sleep(0.05)
    assert server.metrics()["finished"] == before + 1
    assert server.metrics()["row_blocks"] == 0


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", b"{not json", "JSON"),
        ("/v1/completions", b'{"prompt": 5}', "prompt must be a string"),
        ("/v1/completions", b'{"prompt": "a", "best": 5}', "Unexpected fields"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 90000}', "raise max_tokens"),
        ("/v1/completions", b'{"prompt": "a", "temperature": "hot"}', "hot"),
        ("/v1/completions", b'{"prompt": "a", "temperature": -2}', "temperature"),
        ("/v1/completions", b'{"prompt": "a", "seed": "x"}', "seed must be an integer"),
        ("/v1/completions", b'{"prompt": "a", "stream": true, "max_tokens": 90000}', "raise max_tokens"),
        ("/v1/chat/completions", b"{}", "messages"),
        ("/v1/chat/completions", b'{"messages": "hello"}', ""),
    ],
)
def test_bad_bodies_are_answered_by_a_4xx_that_says_why(server: Live, path: str, body: bytes, words: str) -> None:
    status, said = server.post(path, body)
    assert 400 <= status < 500, said
    assert words in said
    assert server.complete()


def test_models_health_and_metrics(server: Live) -> None:
    server.complete()
    assert [each.id for each in server.client.models.list().data]
    assert server.get("/health")[0] == 200
    told = server.metrics()
    assert told["new_tokens"] > 0
    assert told["cached_tokens"] > 0
    assert told["waiting"] == told["decoding"] == 0


def test_a_signal_lets_requests_end_and_cancels_what_takes_too_long(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.jinja"))
    live = Live(folder, "--shutdown-timeout", "5")
    status, said = live.post("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hello"}]}')
    assert 400 <= status < 500
    assert "template" in said
    with ThreadPoolExecutor(2) as pool:
        short, long = (pool.submit(live.complete, max_tokens=number) for number in (40, 1900))
        deadline = time.monotonic() + 30
        while live.metrics().get("decoding") != 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = time.monotonic()
        assert live.close() == 0
        assert time.monotonic() - started < 30
        assert short.result(1)
        with pytest.raises(openai.APIError):
            long.result(1)


@pytest.mark.parametrize(
    "options", [["--max-tokens", "many"], ["--max-rows", "0"], ["--cache", "int5"], ["--disk-limit", "1GiB"], []]
)
def test_bad_options_end_with_status_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *(["model"] if options else []), *options])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
