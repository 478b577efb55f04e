"""The report: rows of every shape become claims, what is missing is run or named, and one file holds all of it."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from evals.report.__main__ import main
from evals.report.claims import Claim, claims_of
from evals.report.jobs import JOBS, Job, Outcome, run_jobs
from evals.report.page import Plot, to_html, to_markdown
from evals.report.rows import Found, newest, read_results

FACTS = {"device": "cpu: test", "date": "2026-01-02T03:04:05+00:00", "revision": "abc123"}
EQUALITY = {
    "eval": "equality", "model": "m", "side": "paged+hf_kvopt", "baseline": "dynamic+sdpa", "scenario": "greedy",
    "dtype": "float32", "is_equal": True, "num_tokens": 48, "num_equal": 48, **FACTS,
}  # fmt: skip
BAR = {
    "eval": "speed-bar", "model": "m", "metric": "step_ms", "context": 8192, "side": "paged+hf_kvopt",
    "baseline": "dynamic+sdpa", "ratio": 0.5, "limit": 0.55, "is_met": True, **FACTS,
}  # fmt: skip
LOSS = {
    "eval": "perplexity", "model": "m", "side": "int8+hf_kvopt", "baseline": "dynamic+sdpa", "chunk": 16,
    "context": 1025, "bars": [{"metric": "delta", "limit": 0.0005, "value": 0.0004, "met": True}], **FACTS,
}  # fmt: skip
OTHER = {
    "eval": "prefix", "model": "m", "length": 4096, "batch": 1, "hit": 0.95, "plain_ms": 800.0, "shared_ms": 100.0,
    "shared_over_plain": 0.125, "bar": {"most": 0.1, "is_met": False},
}  # fmt: skip


def found(*rows: dict[str, Any], is_quick: bool = False) -> list[Found]:
    return [Found(row, "rows.json", is_quick) for row in rows]


def test_losses_behind_a_prefill_are_claims_of_their_own() -> None:
    newer = {**LOSS, "prefill": 0, "date": "2027-01-02T03:04:05+00:00"}
    behind = {**newer, "prefill": 512, "bars": [], "delta": 0.002}
    claims = claims_of(found(LOSS, newer, behind))
    assert [claim.when[:4] for claim in claims] == ["2027", "2027"]
    assert "in chunks of 16 behind 512 at once: loss" in claims[1].claim


def test_every_kind_of_row_becomes_a_claim_with_its_verdict() -> None:
    claims = {claim.eval: claim for claim in claims_of(found(EQUALITY, BAR, LOSS, OTHER | FACTS))}
    assert [claims[name].is_met for name in ("equality", "speed", "perplexity", "prefix")] == [True, True, True, False]
    assert claims["equality"].measured == "48 of 48 tokens in 1 scenarios"
    assert (claims["speed"].goal, claims["speed"].measured) == ("at most 0.55x", "0.500x")
    assert (claims["perplexity"].goal, claims["perplexity"].measured) == ("at most +0.050%", "+0.040%")
    assert claims["speed"].when == "2026-01-02 03:04"
    assert {claim.where for claim in claims.values()} == {"cpu: test"}


def test_one_unequal_scenario_misses_the_claim() -> None:
    wrong = EQUALITY | {"scenario": "beam", "is_equal": False, "num_equal": 40}
    (claim,) = claims_of(found(EQUALITY, wrong))
    assert claim.is_met is False
    assert claim.measured == "88 of 96 tokens in 2 scenarios"


def test_the_newest_row_of_a_configuration_counts_and_a_full_run_before_a_quick_one() -> None:
    old, new = BAR | {"date": "2025", "ratio": 0.9}, BAR | {"date": "2026", "ratio": 0.4}
    assert [row.fields["ratio"] for row in newest(found(new, old), "context")] == [0.4]
    both = [*found(BAR | {"date": "2027", "ratio": 0.1}, is_quick=True), *found(old)]
    assert [row.fields["ratio"] for row in newest(both, "context")] == [0.9]


def test_a_quick_run_is_judged_by_what_is_counted_alone() -> None:
    slow = BAR | {"ratio": 2.0, "is_met": False}
    wrong = EQUALITY | {"is_equal": False, "num_equal": 3}
    assert [claim.is_met for claim in claims_of(found(wrong, slow, is_quick=True))] == [False, None]


def test_a_figure_that_a_source_has_wrong_is_told_with_what_it_forgot() -> None:
    row = {"eval": "memory", "what": "textbook", "model": "7B", "context": 1000, "said": 5.0, "unit": "GB", **FACTS}
    right = row | {"computed": 5.01, "is_right": True, "note": ""}
    wrong = row | {"computed": 9.0, "is_right": False, "note": "forgets the heads", "said": 4.0}
    first, second = claims_of(found(right, wrong))
    assert (first.goal, first.measured, first.is_met) == ("5 GB", "5.01 GB", True)
    assert (second.measured, second.is_met) == ("9 GB; a source's 4 GB forgets the heads", None)


def test_claims_with_a_goal_come_first() -> None:
    plain = LOSS | {"bars": [], "side": "k8v4+hf_kvopt", "delta": 0.1}
    assert [claim.goal for claim in claims_of(found(plain, LOSS))] == ["at most +0.050%", "-"]


def test_rows_that_lack_a_field_are_said_and_stop_nothing() -> None:
    claims = claims_of(found({"eval": "equality", "side": "x", "dtype": "float32"}, BAR))
    assert [claim.eval for claim in claims] == ["equality", "speed"]
    assert "no field" in claims[0].measured


def test_files_of_both_shapes_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([BAR]))
    (tmp_path / "gpu-x.json").write_text(json.dumps({"device": "H200", "rows": [{"passed": True}]}))
    (tmp_path / "broken.json").write_text("{")
    rows, faults = read_results(tmp_path)
    assert [(row.eval, row.where) for row in rows] == [("speed-bar", "cpu: test"), ("gpu", "H200")]
    assert len(faults) == 1
    assert faults[0].startswith("broken.json")


def test_the_page_is_one_file_and_hostile_text_stays_text() -> None:
    claim = Claim("speed", "<script>x</script>", "a|b", "1", False, "here", "now", "abc", True)
    outcome = Outcome("gpu", "python -m evals.gpu", "no card", 0)
    page = to_html("t", [claim], [Plot("speed", "p", "data:image/png;base64,AA==")], [outcome])
    assert "<script>" not in page
    assert "quick run" in page
    assert "no card" in page
    # Nothing is fetched from anywhere.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "a\\|b" in to_markdown("t", [claim], [])


def test_a_whole_report_from_collected_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    (results / "speed-cpu.json").write_text(json.dumps([BAR]))
    assert main(["--collect", "--results", str(results), "--out", str(out)]) == 0
    assert "at most 0.55x" in (out / "report.html").read_text()
    assert "| at most 0.55x | 0.500x | met |" in (out / "report.md").read_text()
    (results / "speed-cpu.json").write_text(json.dumps([BAR | {"is_met": False}]))
    assert main(["--collect", "--results", str(results), "--out", str(out)]) == 1


def test_what_is_missing_is_run_small_and_marked_quick(tmp_path: Path) -> None:
    arguments = ["--quick", "--only", "why", "--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert (tmp_path / "quick" / "why.json").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "820 against 40" in page
    assert "quick run" in page
    assert "data:image/png" in page


def test_an_eval_that_fails_or_finds_no_time_is_named(tmp_path: Path) -> None:
    jobs = [Job("why", ("--keys no",), "", "why.json"), Job("nosuch", ("",), "", "x.json")]
    broken, missing = run_jobs(jobs, tmp_path, False, time.monotonic() + 10**6, lambda _: None)
    assert broken.detail.startswith("exit status 2")
    assert missing.detail == "this eval is not part of this checkout"
    (late,) = run_jobs(jobs[:1], tmp_path, False, 0.0, lambda _: None)
    assert late.detail == "no time left"


def test_every_eval_has_one_job() -> None:
    assert len({job.name for job in JOBS}) == len(JOBS)
    assert {
        "equality",
        "perplexity",
        "needle",
        "speed",
        "memory",
        "prefix",
        "fragmentation",
        "acceptance",
        "kernels",
        "gpu",
        "why",
    } <= {job.name for job in JOBS}
