"""The picture and the table of losses over models take the newest whole readings, and one chunk size a panel."""

from pathlib import Path

from evals.report.figures import fill
from evals.report.rows import Found
from evals.report.trade import front, latest_losses, plot_losses


def row(side: str, date: str = "2026-01-01", **given: object) -> Found:
    fields = {
        "eval": "perplexity", "model": "smollm2", "corpus": "prose", "side": side, "baseline": "dynamic+sdpa",
        "chunk": 16, "date": date, "kl_mean": 1e-3, "delta": 0.001, "delta_low": -0.001, "delta_high": 0.002,
        "top1_agreement": 0.99, "bf16_share": 0.5, "bf16_share_32k": 0.28, "num_segments": 4, "context": 513,
        "dtype": "float32", "bars": [{"metric": "kl_mean", "limit": 7e-3, "value": 1e-3, "met": True}], **given,
    }  # fmt: skip
    return Found(fields, "perplexity.json", False)


def test_panels_hold_the_newest_row_of_each_side_at_one_chunk_size() -> None:
    rows = [
        row("int4+hf_kvopt", kl_mean=5e-3),
        row("int4+hf_kvopt", "2026-02-01", kl_mean=2e-3),
        row("int4+hf_kvopt", chunk=512),
        row("transformers_fp8+sdpa", bf16_share_32k=None),
        row("dynamic+sdpa"),
        row("int4+hf_kvopt", corpus="programs", prefill=512),
    ]
    panels = latest_losses(rows)
    assert list(panels) == ["smollm2, prose"]
    found = {f["side"]: f for f in panels["smollm2, prose"]}
    assert set(found) == {"int4+hf_kvopt", "transformers_fp8+sdpa"}
    assert found["int4+hf_kvopt"]["kl_mean"] == 2e-3


def test_the_line_joins_what_nothing_beats_in_both() -> None:
    points = [(0.28, 4e-2), (0.29, 2e-3), (0.24, 7e-3), (0.52, 6e-4), (0.40, 1e-2), (0.52, 2e-3)]
    assert front(points) == [(0.24, 7e-3), (0.29, 2e-3), (0.52, 6e-4)]
    assert front([]) == []


def test_the_table_has_bytes_losses_and_goals(tmp_path: Path) -> None:
    rows = [row("int4+hf_kvopt"), row("transformers_fp8+sdpa", bf16_share_32k=None, bars=[])]
    page = fill("<!-- figures: real -->\nold\n<!-- end -->", rows)
    assert "| int4 | 0.28 | +0.10 % [−0.10 %, +0.20 %] | 1.0e-03 | 99.0% | KL 7.0e-03, met |" in page
    assert "| transformers' fp8 | 0.50 |" in page
    plot_losses(tmp_path / "p.png", rows)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    plot_losses(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()
