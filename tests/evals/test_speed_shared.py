"""The eval of rows that begin alike writes a row where both ways give the same bits, and no other."""

import json
from pathlib import Path

import pytest

from evals.speed import shared
from hf_kvopt.kernels.cpu import paged_attention
from hf_kvopt.kernels.cpu.program import can_compile

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")
SHORT = ["--rows", "3", "--shared", "130", "--own", "5", "--repeats", "2", "--kv-heads", "4", "--formats", "native"]


def short_run(out: Path) -> tuple[int, list[dict]]:
    status = shared.make_parser().run(shared.run, [*SHORT, "--out", str(out)])
    return status, json.loads(out.read_text()) if out.exists() else []


def test_attention_and_step_have_a_row_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = paged_attention._attend_shared
    monkeypatch.setattr(
        paged_attention, "_attend_shared", lambda runs, *rest: seen.append(runs.most) or original(runs, *rest)
    )
    status, rows = short_run(tmp_path / "rows.json")
    assert status == 0
    assert [row["what"] for row in rows] == ["attention", "step"]
    assert all(row["speedup"] == row["row_by_row_ms"] / row["once_ms"] > 0 for row in rows)
    assert set(seen) == {128}
    assert len(seen) == 2 * 3 * 8  # once a layer: two jobs, a check and two turns


def test_a_bit_that_differs_is_said_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paged_attention, "_attend_shared", lambda *_: None)
    status, rows = short_run(tmp_path / "rows.json")
    assert (status, rows) == (1, [])
    assert "DIFFERS" in capsys.readouterr().err
