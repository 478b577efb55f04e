"""The policies eval holds what each budget says, and a budget of all loses nothing."""

import json
from pathlib import Path

import pytest

from evals.policies.__main__ import main
from evals.policies.stream import verdict

SHORT = ["--shape", "tiny", "--context", "256", "--segments", "2", "--samples", "1", "--depths", "2"]


def test_rows_say_what_was_held_and_lost(tmp_path: Path) -> None:
    assert main([*SHORT, "--budgets", "0.5", "1", "--out", str(tmp_path / "rows.json")]) == 0
    rows = {(row["policy"], row["budget"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["whole", 1.0]["perplexity_ratio"] == 1
    assert len(rows) == 1 + 8 * 2
    for policy in ("Knorm", "TOVA", "SnapKV", "PyramidKV", "ExpectedAttention"):
        whole, half = rows[policy, 1.0], rows[policy, 0.5]
        assert (whole["held"], whole["perplexity_ratio"]) == (1, pytest.approx(1, abs=1e-4))
        assert whole["needle"] == rows["whole", 1.0]["needle"]
        assert 0.4 < half["held"] < 0.75
    # Seven of eight chunks shrink to 16 of their 32 tokens.
    assert 0.5 < rows["Hierarchical", 0.5]["held"] < 0.75
    assert rows["Hierarchical", 1.0]["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert rows["SnapKV", 0.5]["bar"]["most_points"] == 0.01
    assert rows["DuoAttention", 0.5]["bar"]["most_perplexity"] is None
    assert rows["Knorm", 0.5]["bar"] is None
    assert (tmp_path / "policies-random-tiny.png").stat().st_size > 1000


def test_a_stream_writes_rows_as_it_goes_and_holds_no_more_at_its_end(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    given = ["--shape", "tiny", "--stream", "400", "--recent", "64", "--format", "int8", "--out", str(out)]
    assert main(given) == 0
    rows = json.loads(out.read_text())
    assert [row["tokens"] for row in rows] == list(range(20, 401, 20))
    assert [row["bar"] for row in rows[:-1]] == [None] * 19
    assert rows[-1]["bar"]["grown_bytes"] == 0
    assert rows[-1]["evicted"] >= 64 + 400 - 4 - 64 - 2 * 16
    assert len({row["used_bytes"] for row in rows}) == 1


def test_a_stream_that_slows_down_or_grows_misses_its_bar() -> None:
    flat = [{"token_ms": 10.0, "used_bytes": 5, "reserved_bytes": 9} for _ in range(20)]
    assert verdict(flat)["is_met"]
    assert verdict(flat[:15] + [{**row, "token_ms": 10.4} for row in flat[15:]])["is_met"]
    assert not verdict(flat[:15] + [{**row, "token_ms": 10.6} for row in flat[15:]])["is_met"]
    for name in ("used_bytes", "reserved_bytes"):
        assert not verdict([*flat[:-1], {**flat[-1], name: 10}])["is_met"]
