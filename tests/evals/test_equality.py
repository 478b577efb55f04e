"""The equality eval is green where it should be, red where it should be, and clear about bad arguments."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evals._common.noise import LOGIT_NOISE
from evals.equality.__main__ import main
from evals.equality.compare import Comparison, compare
from evals.equality.scenario import SCENARIOS, Run

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--prompt-len", "9", "--new-tokens", "6"]


def short_run(out: Path, *arguments: str) -> tuple[int, list[dict]]:
    status = main([*SHORT, "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_every_scenario_is_equal_for_static_and_paged(tmp_path: Path) -> None:
    sides = ["static+sdpa", "paged+hf_kvopt", "paged+sdpa"]
    status, rows = short_run(tmp_path / "rows.json", "--shape", "tiny", "--sides", *sides)
    assert status == 0
    assert {(row["side"], row["scenario"]) for row in rows} == {(s, c.name) for s in sides for c in SCENARIOS}
    for row in rows:
        assert row["is_equal"]
        assert row["num_equal"] == row["num_tokens"] > 0
        assert row["first_divergence"] is None


def test_rows_say_what_they_were_measured_on_and_are_appended(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--sides", "static+sdpa", "--scenarios", "greedy"]
    _, once = short_run(tmp_path / "new" / "rows.json", *arguments)
    _, twice = short_run(tmp_path / "new" / "rows.json", *arguments)
    assert twice[: len(once)] == once
    assert len(twice) == 2 * len(once)
    for field in ("revision", "date", "device", "torch", "transformers", "dtype", "seed", "baseline"):
        assert once[0][field] not in (None, "")


def test_model_path_prompts_with_text_of_the_heldout_file_and_of_a_data_set(tmp_path: Path, model_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps({"text": "a line of text " * 9}) + "\n")
    arguments = ["--model", str(model_path), "--sides", "static+sdpa", "--scenarios", "padded"]
    assert short_run(tmp_path / "rows.json", *arguments)[0] == 0
    assert short_run(tmp_path / "rows.json", *arguments, "--dataset", str(folder))[0] == 0


@pytest.mark.parametrize(("cache", "scenario"), [("swapped", "greedy"), ("poisoned", "padded"), ("unordered", "beam")])
def test_a_broken_cache_turns_it_red(tmp_path: Path, cache: str, scenario: str) -> None:
    arguments = ["--shape", "tiny", "--sides", f"tests.evals.broken_caches:{cache}+sdpa", "--scenarios", scenario]
    status, rows = short_run(tmp_path / "rows.json", *arguments)
    assert status == 1
    assert not rows[0]["is_equal"]
    assert (rows[0]["max_logit_delta"] is None) == (cache == "poisoned")


def test_bfloat16_reports_the_divergence_and_stays_green(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--dtype", "bfloat16", "--scenarios", "greedy"]
    status, rows = short_run(tmp_path / "rows.json", *arguments, "--sides", "tests.evals.broken_caches:poisoned+sdpa")
    assert status == 0
    assert rows[0]["first_divergence"].keys() == {"row", "step", "margin"}


def run_of(tokens: list[list[int]], logits: Tensor) -> Run:
    lengths = torch.full((len(tokens),), len(logits))
    return Run(tokens=torch.tensor(tokens), logits=logits, lengths=lengths)


def compared(baseline: Run, run: Run) -> Comparison:
    return compare(baseline, run, LOGIT_NOISE["float32"])


def test_first_divergence_is_the_earliest_with_the_margin_of_the_baseline() -> None:
    logits = torch.zeros(3, 2, 5)
    logits[1, 1, 2], logits[1, 1, 3] = 4.0, 3.5
    baseline = run_of([[1, 1, 1], [1, 2, 1]], logits)
    comparison = compared(baseline, run_of([[1, 1, 0], [1, 3, 3]], logits))
    assert comparison.divergence == (1, 1, 0.5)
    assert comparison.num_equal == 2 + 1


def test_a_run_that_ends_earlier_differs_where_it_ends() -> None:
    logits = torch.ones(3, 1, 5)
    comparison = compared(run_of([[1, 1, 1]], logits), run_of([[1, 1]], logits[:2]))
    assert comparison.divergence is not None
    assert comparison.divergence.step == 2
    assert not comparison.is_equal


def test_logits_behind_a_divergence_are_not_compared() -> None:
    logits, other = torch.ones(3, 1, 5), torch.ones(3, 1, 5)
    other[2] = 100.0
    comparison = compared(run_of([[1, 1, 1]], logits), run_of([[1, 2, 1]], other))
    assert comparison.max_logit_delta == 0.0


def test_nan_is_never_equal_and_equal_infinities_are() -> None:
    logits = torch.ones(2, 1, 4)
    logits[0, 0, 0] = -math.inf
    assert compared(run_of([[1, 1]], logits), run_of([[1, 1]], logits.clone())).is_equal
    poisoned = logits.clone()
    poisoned[1, 0, 2] = math.nan
    assert not compared(run_of([[1, 1]], logits), run_of([[1, 1]], poisoned)).is_equal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sides", "paper+sdpa"], "unknown cache 'paper': known are dynamic, static, paged"),
        (["--sides", "static+flash"], "unknown attention 'flash': known are"),
        (["--sides", "static"], "cache+attention"),
        (["--sides", "tests.evals.broken_caches:absent+sdpa"], "'tests.evals.broken_caches:absent'"),
        (["--baseline", "dynamic+nothing"], "unknown attention 'nothing'"),
        (["--model", "./no/such/model"], "'./no/such/model'"),
        (["--shape", "huge"], "'huge'"),
        (["--new-tokens", "-1"], "at least 1, got -1"),
        (["--prompt-len", "many"], "expected an integer, got 'many'"),
        (["--device", "toaster"], "cannot use device 'toaster'"),
        (["--scenarios", "dream"], "'dream'"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_a_file_that_is_no_list_of_rows_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    out.write_text("{}")
    with pytest.raises(SystemExit):
        main([*SHORT, "--shape", "tiny", "--sides", "static+sdpa", "--scenarios", "greedy", "--out", str(out)])
    assert out.read_text() == "{}"


def test_the_command_leaves_no_traceback() -> None:
    command = [sys.executable, "-m", "evals.equality", "--sides", "paper+sdpa"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("evals.equality: error:")
    assert "Traceback" not in done.stderr


def test_a_text_of_the_user_is_read_and_named_in_the_rows(tmp_path: Path, model_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("def first(values):\n    return values[0]\n" * 40)
    arguments = ["--model", str(model_path), "--text", str(text), "--scenarios", "greedy", "--sides", "paged+hf_kvopt"]
    status, rows = short_run(tmp_path / "rows.json", *arguments)
    assert status == 0
    assert rows[0]["dataset"] == str(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read --text"), (b"\xff\xfe\x00", "cannot read --text"), (b" \n", "holds no text")],
)
def test_a_text_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    text = tmp_path / "notes.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        short_run(tmp_path / "rows.json", "--shape", "tiny", "--text", str(text))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def once(*arguments: Any) -> Comparison:
        if done:
            raise KeyboardInterrupt
        done.append(arguments)
        return compare(*arguments)

    monkeypatch.setattr("evals.equality.__main__.compare", once)
    out = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        short_run(out, "--shape", "tiny", "--scenarios", "greedy", "padded")
    assert len(json.loads(out.read_text())) == 1
