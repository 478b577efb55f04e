"""The memory eval says what live caches hold, and which textbook figures are off."""

import json
from pathlib import Path

import pytest

from evals import memory
from evals.memory import KINDS, TEXTBOOK, Live, main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_kind_holds_what_was_predicted(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    assert main(["--formats", "native", "int4", "--steps", "4", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    live = [row for row in rows if row["what"] == "live"]
    assert {(row["kind"], row["format"]) for row in live} == {
        (kind, fmt) for kind in KINDS for fmt in ("native", "int4") if (kind, fmt) != ("MLA", "int4")
    }
    assert all(row["predicted"] == row["held"] and min(row["held"]) > 0 for row in live)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_off_exactly_where_a_note_says_what_it_forgot() -> None:
    assert [bool(figure.note) for figure in TEXTBOOK] == [not figure.is_right for figure in TEXTBOOK]
    assert sum(bool(figure.note) for figure in TEXTBOOK) == 2


def test_a_cache_that_holds_something_else_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "hold", lambda kind, fmt, args: Live(kind, fmt, (1, 2), (1, 3)))
    assert main(["--out", str(tmp_path / "memory.json")]) == 1
