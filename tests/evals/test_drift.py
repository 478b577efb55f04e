"""The drift eval writes answers of one length, and holds them against the baseline's place by place."""

import json
from pathlib import Path

import pytest
import torch

from evals._common.reading import Scores
from evals._common.shapes import random_model
from evals._common.sides import Side
from evals.drift.__main__ import main
from evals.drift.measure import Drift, by_quarter, measure_drift

SHORT = ["--shape", "tiny", "--prompts", "2", "--prompt-len", "12", "--new-tokens", "16", "--chunk", "5"]
LOSSY = "tests.evals.lossy_caches"


def test_a_cache_that_keeps_all_writes_the_same_answer_and_one_that_rounds_drifts(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert main([*SHORT, "--sides", "paged+hf_kvopt", f"{LOSSY}:rounded+sdpa", "--out", str(out)]) == 0
    baseline, paged, rounded = json.loads(out.read_text())
    assert baseline["side"] == "dynamic+sdpa"
    assert paged["first_divergence"] == [16, 16]
    assert paged["equal_share"] == 1.0
    assert max(paged["kl_by_quarter"]) < 1e-6 < 1e-4 < min(rounded["kl_by_quarter"])
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_the_forced_reading_follows_the_answer_of_the_baseline() -> None:
    model = random_model("tiny")
    prompts = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    drift = measure_drift(model, [Side("dynamic", "sdpa"), Side("paged", "hf_kvopt")], prompts, 8, 3)[1]
    # Every token of a greedy answer is the likeliest one of whoever reads it without loss.
    assert drift.forced.is_right.shape == (2, 7)
    assert drift.forced.is_right.all()


def test_the_first_divergence_counts_the_tokens_before_it() -> None:
    equal = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    none = torch.zeros(3, 3)
    drift = Drift(Side("int4", "hf_kvopt"), equal, Scores(none, none, none.bool(), none.bool()))
    assert drift.first_divergence == [2, 4, 0]


def test_quarters_are_in_order() -> None:
    assert by_quarter(torch.arange(8.0).view(1, 8)) == [0.5, 2.5, 4.5, 6.5]


def test_too_few_tokens_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, "--new-tokens", "4"])
    assert "at least 8, got 4" in capsys.readouterr().err
