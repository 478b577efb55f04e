"""The batching eval runs the same requests by each way, and writes no side whose tokens differ."""

import json
from pathlib import Path

import pytest
import torch

from evals.batching import __main__ as command
from evals.batching.workload import arrivals, draw, percentile

SHORT = ["--shape", "tiny", "--requests", "6", "--scale", "64", "--pool", "512", "--short-pool", "512", "--batch", "3"]


def test_rows_say_what_each_side_computed_and_the_picture_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert command.main([*SHORT, "--rounds", "2", "--without", "load", "--out", str(out)]) == 0
    rows = {row["side"]: row for row in json.loads(out.read_text())}
    assert {"ours", "ours, short of blocks", "static batches"} <= set(rows)
    assert all(len(row["seconds_of_rounds"]) == row["rounds"] == 2 for row in rows.values())
    assert rows["ours"]["computed_tokens"] <= rows["ours"]["useful_tokens"]
    assert rows["ours"]["padded_tokens"] == 0 < rows["static batches"]["padded_tokens"]
    assert rows["ours"]["computed_tokens"] < rows["static batches"]["computed_tokens"]
    assert rows["ours"]["first_token_p50_s"] > 0
    assert {bar["of"] for bar in rows["ours"]["bars"]} >= {"padded tokens", "tokens/s over static batches"}
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_side_whose_tokens_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "alone", lambda _, chats: [[] for _ in chats])
    out = tmp_path / "rows.json"
    assert (
        command.main(
            [*SHORT, "--rounds", "1", "--without", "load", "generate_batch", "static", "pressure", "--out", str(out)]
        )
        == 1
    )
    assert json.loads(out.read_text()) == []


def test_requests_are_those_of_the_fragmentation_eval_and_begin_alike() -> None:
    chats = draw(40, torch.arange(100_000), 8, 0)
    assert max(len(chat.prompt) for chat in chats) <= 3072 // 8
    assert len({tuple(chat.prompt[:48]) for chat in chats}) < 40
    times = arrivals(1000, 5.0, 0)
    assert times == sorted(times)
    assert 150 < times[-1] < 250
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
