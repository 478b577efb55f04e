"""The speed eval writes a row for each side that gives the right logits, and for no other."""

import json
from pathlib import Path

import pytest
import torch

from evals._common.memory import kv_bytes, peak_bytes
from evals._common.shapes import random_model
from evals._common.sides import Side
from evals.speed.__main__ import main
from evals.speed.bars import BARS, DYNAMIC, OURS, STATIC, judge
from evals.speed.measure import Timings, median_ratio
from hf_kvopt import CACHE_KEYWORD

SHORT = ["--shape", "tiny", "--contexts", "12", "--steps", "3", "--new-tokens", "2", "--repeats", "2"]


def short_run(out: Path, *arguments: str) -> tuple[int, list[dict]]:
    status = main([*SHORT, "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_default_sides_give_a_row_each(tmp_path: Path) -> None:
    status, rows = short_run(tmp_path / "rows.json", "--no-peak", "--batches", "1", "2")
    assert status == 0
    assert [(row["side"], row["batch"]) for row in rows] == [
        (str(side), batch) for batch in (1, 2) for side in (DYNAMIC, STATIC, OURS)
    ]
    for row in rows:
        assert row["context"] == 12
        low, high = row["step_ms_range"]
        assert 0 < low <= row["step_ms"] <= high
        assert min(row["prefill_ms"], row["step_ms_mean"], row["generate_tokens_per_s"]) > 0
        assert row["kv_reserved_bytes"] >= row["kv_used_bytes"] > 0
        assert row["peak_bytes"] is None
        for field in ("revision", "date", "device", "threads", "torch", "transformers", "baseline"):
            assert row[field] not in (None, "")
    assert rows[0]["step_ratio"] == 1.0


def test_peak_memory_is_measured_in_a_fresh_process(tmp_path: Path) -> None:
    arguments = ["--sides", "static+sdpa", "--new-tokens", "0"]
    status, rows = short_run(tmp_path / "rows.json", *arguments)
    assert status == 0
    assert rows[0]["peak_bytes"] >= 0
    assert rows[0]["generate_tokens_per_s"] is None


def test_no_row_is_written_for_a_side_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ["dynamic+sdpa", "tests.evals.broken_caches:swapped+sdpa"]
    status, rows = short_run(tmp_path / "rows.json", "--no-peak", "--sides", *sides)
    assert status == 1
    assert [row["side"] for row in rows] == ["dynamic+sdpa"]
    assert "DIFFERS" in capsys.readouterr().out


def test_a_coarse_cache_is_timed_though_its_logits_move(tmp_path: Path) -> None:
    status, rows = short_run(tmp_path / "rows.json", "--no-peak", "--sides", "dynamic+sdpa", "int8+hf_kvopt")
    assert status == 0
    assert [row["side"] for row in rows] == ["dynamic+sdpa", "int8+hf_kvopt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sides", "paper+sdpa"], "unknown cache 'paper'"),
        (["--contexts", "-5"], "at least 1, got -5"),
        (["--repeats", "0"], "at least 1, got 0"),
        (["--steps", "0"], "at least 1, got 0"),
        (["--model", "/no/such/model"], "'/no/such/model'"),
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


def test_ratio_pairs_the_repeats_so_that_drift_cancels() -> None:
    assert median_ratio([1.0, 2.0, 40.0], [2.0, 4.0, 80.0]) == 0.5


def test_bars_are_judged_where_context_and_sides_were_measured() -> None:
    timings = {
        OURS: Timings(prefill_ms=[10.0], step_ms=[5.0]),
        DYNAMIC: Timings(prefill_ms=[10.0], step_ms=[10.0]),
        STATIC: Timings(prefill_ms=[10.0], step_ms=[5.0]),
    }
    met = {(verdict.bar.metric, verdict.bar.peer): verdict.is_met for verdict in judge(8192, timings)}
    assert met == {("step_ms", STATIC): False, ("step_ms", DYNAMIC): True, ("prefill_ms", DYNAMIC): True}
    assert {verdict.bar for verdict in judge(2048, timings)} == {bar for bar in BARS if bar.context is None}
    assert judge(8192, {DYNAMIC: Timings()}) == []


@pytest.mark.parametrize("name", ["dynamic", "static", "paged"])
def test_kv_bytes_are_those_of_the_tokens_and_those_kept(name: str) -> None:
    model = random_model("tiny")
    side = Side(name, "sdpa")
    cache = side.make_cache(side.attend(model), 64)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 32, dtype=torch.int64), **{CACHE_KEYWORD: cache})
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4
    assert kv_bytes(cache).used == config.num_hidden_layers * 2 * 32 * per_token
    assert kv_bytes(cache).reserved >= kv_bytes(cache).used


def test_peak_bytes_sees_memory_that_was_freed_again() -> None:
    def body() -> None:
        torch.ones(64 << 20, dtype=torch.uint8)

    assert peak_bytes(torch.device("cpu"), body) >= 60 << 20
