"""The tiers eval writes a row for each prompt whose tokens are those of a computed one, and none for another."""

import json
from pathlib import Path

import pytest

from evals import tiers
from evals.tiers import main

SHORT = ["--shape", "tiny", "--lengths", "64", "--formats", "native", "int8", "--repeats", "1"]


def test_rows_say_where_the_prompt_lay(tmp_path: Path) -> None:
    assert main([*SHORT, "--out", str(tmp_path / "rows.json")]) == 0
    rows = {row["format"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"native", "int8"}
    assert 0 < rows["int8"]["disk_bytes"] < rows["native"]["disk_bytes"]
    assert all(rows["native"][f"{place}_ms"] > 0 for place in tiers.PLACES)
    assert rows["native"]["bar"]["least"] == 5.0


def test_a_prompt_whose_tokens_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiers._generate
    draws = iter(range(100))
    monkeypatch.setattr(tiers, "_generate", lambda *args: original(*args) + next(draws))
    assert main([*SHORT, "--out", str(tmp_path / "rows.json")]) == 1
    assert not (tmp_path / "rows.json").exists()
