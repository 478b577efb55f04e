"""The policies eval holds what each budget says, and a budget of all loses nothing."""

import json
from pathlib import Path

import pytest

from evals.policies.__main__ import main

SHORT = ["--shape", "tiny", "--context", "256", "--segments", "2", "--samples", "1", "--depths", "2"]


def test_rows_say_what_was_held_and_lost(tmp_path: Path) -> None:
    assert main([*SHORT, "--budgets", "0.5", "1", "--out", str(tmp_path / "rows.json")]) == 0
    rows = {(row["policy"], row["budget"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["whole", 1.0]["perplexity_ratio"] == 1
    assert len(rows) == 1 + 7 * 2
    for policy in ("Knorm", "TOVA", "SnapKV", "PyramidKV", "ExpectedAttention"):
        whole, half = rows[policy, 1.0], rows[policy, 0.5]
        assert (whole["held"], whole["perplexity_ratio"]) == (1, pytest.approx(1, abs=1e-4))
        assert whole["needle"] == rows["whole", 1.0]["needle"]
        assert 0.4 < half["held"] < 0.75
    assert rows["SnapKV", 0.5]["bar"]["most_points"] == 0.01
    assert rows["DuoAttention", 0.5]["bar"]["most_perplexity"] is None
    assert rows["Knorm", 0.5]["bar"] is None
    assert (tmp_path / "policies-random-tiny.png").stat().st_size > 1000
