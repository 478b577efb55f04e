"""The prefix eval counts what is computed, and writes no row for a cell whose tokens differ."""

import json
import types
from pathlib import Path

import pytest
import torch

from evals.prefix import measure as measuring
from evals.prefix.__main__ import main

SHORT = ["--shape", "tiny", "--lengths", "64", "--batches", "1", "3", "--hits", "0", "0.75", "--repeats", "2"]


def test_rows_say_what_was_computed_and_the_picture_is_drawn(tmp_path: Path) -> None:
    assert main([*SHORT, "--out", str(tmp_path / "rows.json")]) == 0
    rows = {(row["batch"], row["hit"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {(1, 0.0), (1, 0.75), (3, 0.0), (3, 0.75)}
    assert rows[1, 0.0]["plain_tokens"] == 64
    assert rows[1, 0.75]["shared_tokens"] <= 17 < rows[1, 0.75]["plain_tokens"] == 64
    assert rows[3, 0.75]["shared_tokens"] < rows[3, 0.75]["plain_tokens"] // 2
    assert rows[3, 0.75]["shared_kv_bytes"] < rows[3, 0.75]["plain_kv_bytes"]
    assert rows[1, 0.0]["bar"]["most"] == 1.02
    assert rows[1, 0.75]["bar"] is None
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_a_cell_whose_tokens_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the module alone: the cache itself compares masks with torch.equal.
    monkeypatch.setattr(measuring, "torch", types.SimpleNamespace(**{**vars(torch), "equal": lambda *_: False}))
    assert main([*SHORT, "--out", str(tmp_path / "rows.json")]) == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == []


@pytest.mark.parametrize("argument", ["1.5", "-1", "half"])
def test_a_share_is_a_number_from_0_to_1(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([f"--hits={argument}"])
    assert left.value.code == 2
    assert "from 0 to 1" in capsys.readouterr().err


def test_rows_of_a_batch_begin_alike_and_go_on_unlike() -> None:
    subject = type("Subject", (), {"model": type("Model", (), {"device": torch.device("cpu")})})
    stream = torch.arange(10_000)
    inputs = measuring._prompts(subject, measuring.Cell(40, 3, 0.5), stream[:20], stream, number=1)
    rows = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert [len(row) for row in rows] == [40, 35, 30]
    assert all(row[:20] == list(range(20)) for row in rows)
    assert len({row[20] for row in rows}) == 3


def test_a_stream_that_comes_round_repeats_no_prompt() -> None:
    subject = type("Subject", (), {"model": type("Model", (), {"device": torch.device("cpu")})})
    stream = torch.arange(100).repeat(3)
    cell = measuring.Cell(50, 4, 0.5)
    firsts = [
        int(row[mask.bool()][25])
        for number in range(8)
        for row, mask in zip(*measuring._prompts(subject, cell, stream[:25], stream, number).values(), strict=True)
    ]
    assert len(set(firsts)) == len(firsts) == 32
    assert torch.equal(stream, torch.arange(100).repeat(3))


def test_a_prompt_of_which_more_is_known_than_the_cell_says_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = measuring._prompts
    monkeypatch.setattr(measuring, "_prompts", lambda *args: prompts(*args[:4], number=1))
    with pytest.raises(RuntimeError, match="positions to be computed"):
        main([*SHORT, "--out", "/dev/null"])
