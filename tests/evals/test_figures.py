"""The page of results says what the rows say: its blocks of figures are made from evals/results alone."""

import re
from pathlib import Path

import pytest

from evals._common.cli import RESULTS, BadArgumentError
from evals.report.figures import BLOCKS, fill
from evals.report.rows import Found, read_results

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


@pytest.fixture(scope="module")
def rows() -> list[Found]:
    found, faults = read_results(RESULTS)
    assert not faults
    return found


def test_every_figure_of_the_page_comes_from_the_rows(rows: list[Found]) -> None:
    text = PAGE.read_text("utf8")
    assert re.findall(r"<!-- figures: (\w+) -->", text) == list(BLOCKS)
    assert fill(text, rows) == text, "run python -m evals.report --collect --figures"


@pytest.mark.parametrize(
    ("eval", "change", "said"),
    [
        ("speed-bar", {"ratio": 3.21, "is_met": False}, "| 3.210x | **missed** |"),
        ("speed", {"step_ms": 77.7}, "| 77.7 |"),
        ("perplexity", {"delta": 0.0321}, "+3.21 %"),
        ("prefix", {"shared_over_plain": 0.5}, "**2.0x** sooner"),
        ("fragmentation", {"waste": 0.123}, "waste 12.3 %"),
        ("acceptance", {"tokens_per_s": 4321.0}, "| 4321 |"),
        ("why", {"naive_queries": 9}, "take 9 queries"),
    ],
)
def test_another_row_is_another_figure(rows: list[Found], eval: str, change: dict, said: str) -> None:
    text = PAGE.read_text("utf8")
    changed = [row._replace(fields=row.fields | change) if row.eval == eval else row for row in rows]
    assert said in fill(text, changed)
    assert said not in text


def test_quick_rows_are_never_quoted(rows: list[Found]) -> None:
    text = PAGE.read_text("utf8")
    hasty = [row._replace(fields=row.fields | {"step_ms": 77.7, "delta": 1.0}, is_quick=True) for row in rows]
    assert fill(text, [*rows, *hasty]) == text


def test_missing_rows_and_unknown_blocks_are_said(rows: list[Found]) -> None:
    with pytest.raises(BadArgumentError, match="rows for the figures of 'speed' are missing"):
        fill("<!-- figures: speed -->\n<!-- end -->", [row for row in rows if row.eval != "speed"])
    with pytest.raises(BadArgumentError, match="block of figures must be one of speed, loss"):
        fill("<!-- figures: dreams -->\n<!-- end -->", rows)


def test_losses_behind_a_prompt_are_another_figure(rows: list[Found]) -> None:
    text = PAGE.read_text("utf8")
    behind = [row._replace(fields=row.fields | {"prefill": 64, "delta": 0.5, "date": "2099"}) for row in rows]
    assert fill(text, [*rows, *(row for row in behind if row.eval == "perplexity")]) == text
