"""The doctor says what is so, and leaves with 1 where something is broken."""

import json
import re
import subprocess
from typing import Any

import pytest
import torch

from hf_kvopt.__main__ import main
from hf_kvopt.cli import doctor
from hf_kvopt.cli.trial import NEW_TOKENS, Trial, run_trials

pytestmark = pytest.mark.usefixtures("one_thread")
INTERPRETED = [Trial("paged", "equal", "24 of 24", 0.1), Trial("int8", "runs", "20 of 24", 0.1)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's answer without its minute."""

    def answer(command: list[str], environment: dict[str, str]) -> Any:
        assert environment["TRITON_INTERPRET"] == "1"
        text = json.dumps([trial._asdict() for trial in INTERPRETED])
        return subprocess.CompletedProcess(command, 0, stdout=text, stderr="")

    monkeypatch.setattr(doctor, "_process", answer)


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_every_section_is_there_and_a_sound_installation_is_healthy(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = report(capsys)
    assert list(said) == ["is_healthy", "versions", "device", "proof", "formats", "falls back", "trial"]
    assert [one["what"][0] for one in said["proof"]] == ["1", "2", "3", "4"]
    assert {one["what"]: one["state"] for one in said["proof"]}["1 interpreter"] == "ok"
    assert (status, said["is_healthy"]) == (0, True)


def test_the_paged_cache_writes_transformers_own_tokens() -> None:
    trials = {trial.cache: trial for trial in run_trials("cpu")}
    exact = {name: trial.result for name, trial in trials.items() if name.startswith("paged")}
    assert exact == {"paged": "equal", "paged, prefix sharing": "equal", "paged, speculation": "equal"}
    assert {trial.result for trial in trials.values()} <= {"equal", "runs"}
    for trial in trials.values():
        same, total = map(int, re.fullmatch(r"(\d+) of (\d+) tokens as transformers'", trial.detail).groups())
        assert total == 2 * NEW_TOKENS
        assert (trial.result == "equal") == (same == total)


def test_what_runs_on_a_cpu_is_told_by_what_is_compiled_there(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_trials", lambda device: INTERPRETED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for compiles, path in ((True, "kernels compiled for this processor"), (False, "torch's operations")):
        monkeypatch.setattr(doctor, "can_compile", lambda compiles=compiles: compiles)
        _, said = report(capsys)
        assert {one["detail"] for one in said["formats"]} == {f"on the CPU, by {path}"}
        falls_back = {one["what"]: one["detail"] for one in said["falls back"]}
        assert falls_back["kernels"] == f"no card: {path} run in place of the Triton kernels"
        # As `plan` says where it plans for a CPU.
        assert falls_back["compile"].endswith("generate() compiles by itself on GPUs alone")


@pytest.mark.slow
def test_the_kernels_run_a_whole_generation_in_the_interpreter() -> None:
    if doctor.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    (found,) = doctor._interpreter()
    assert found.state == "ok", found.detail


@pytest.mark.parametrize("result", ["differs", "fails"])
def test_a_broken_trial_is_bad(
    quick: None, result: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_trials", lambda device: [Trial("paged", result, "x", 0.1)])
    status, said = report(capsys)
    assert (status, said["is_healthy"]) == (1, False)


def test_a_cache_that_fails_is_told_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.run_trials.__globals__["CACHES"], "broken", lambda **_: 1 / 0)
    (trial,) = run_trials("cpu", ["broken"])
    assert (trial.result, trial.detail) == ("fails", "ZeroDivisionError: division by zero")


def test_versions_out_of_range_are_bad_and_missing_extras_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "transformers>=1", 'nosuch>=1; extra == "evals"', "nosuchatall>=1"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: wanted)
    states = {finding.what: finding.state for finding in doctor.versions("torch")}
    assert states["transformers"] == "ok"
    assert states["nosuch"] == "off"
    assert states["nosuchatall"] == "BAD"


def test_a_failing_rung_says_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="one\nRuntimeError: broken kernel\n")
    monkeypatch.setattr(doctor, "_process", lambda *_: done)
    (found,) = doctor._interpreter()
    assert found.state == "BAD"
    assert "broken kernel" in found.detail
    assert doctor._ahead_of_time(True)[0].state == "BAD"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a card")
def test_without_a_card_the_third_rung_says_what_would_prove_it(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "no CUDA device: python -m evals.gpu" in text
    assert "healthy" in text
