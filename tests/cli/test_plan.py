"""`python -m hf_kvopt plan` prints the plan, and `--check` measures it against what was predicted."""

import json
from pathlib import Path

import pytest

from hf_kvopt.__main__ import main
from tests.plan.test_bad_input import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_the_text_gives_choices_predictions_and_lines_to_run(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "H200", "--context", "8k", "--workload", "agent", "--head"]) == 0
    text = capsys.readouterr().out
    for part in ("attention: hf_kvopt", "because", "gain:", "predicted", "Assumed:", "hf_kvopt.enable(model, cache="):
        assert part in text


def test_json_holds_the_same(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "A100-40", "--context", "8k", "--throughput", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["goal"] == "throughput"
    assert said["device"]["name"] == "A100-40"
    assert len(said["choices"]) == 8
    assert said["predicted"]["kv_bytes"] > 0


def test_a_check_measures_what_was_predicted(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--device", "cpu", "--context", "200", "--batch", "2", "--workload", "batch", "--dtype", "float32"]
    assert main(["plan", config, *question, "--check", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)["check"]
    assert checked["is_equal"] is True
    lines = {line["what"]: line for line in checked["lines"]}
    # Bytes are exact; times are whatever this machine takes.
    assert lines["KV bytes used"]["ratio"] == 1.0
    assert all(line["ratio"] > 0 for line in lines.values())


def test_a_check_shortens_what_would_take_too_long(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "H200", "--context", "64k", "--batch", "64", "--check"]) == 0
    assert "measured at 128 tokens a row, not 65,536" in capsys.readouterr().out


def test_a_check_of_a_few_tokens_measures_more(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "H200", "--context", "2", "--check"]) == 0
    assert "measured at 64 tokens a row, not 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "poetry"], "workload must be one of chat"),
        (["--batch", "0"], "--batch: must be a whole number of at least 1: got '0'"),
        (["--device", "abacus"], "device must be auto, cpu or one of"),
        (["--context", "32GiB"], "context must be a positive number of tokens"),
        (["--budget", "1KiB", "--device", "H200"], "is impossible"),
        (["--latency", "--throughput"], "not allowed with argument"),
    ],
)
def test_a_bad_question_is_one_line_and_status_2(
    config: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["plan", config, *arguments])
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message
