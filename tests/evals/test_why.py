"""Naive and cached decoding are counted right and write the same text; tiles give the one-shot softmax."""

import json
from pathlib import Path

import pytest
import torch

from evals.why import main, tiled_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_cache_turns_n_times_n_plus_1_halves_into_n(tmp_path: Path) -> None:
    out, plot = tmp_path / "why.json", tmp_path / "why.png"
    assert main(["--new-tokens", "20", "--keys", "256", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    decoding, *tiles = rows
    assert (decoding["naive_queries"], decoding["cached_queries"]) == (20 * 21 // 2, 20)
    assert (decoding["naive_scores"], decoding["cached_scores"]) == (20 * 21 * 22 // 6, 20 * 21 // 2)
    assert decoding["is_equal"] is True
    assert decoding["naive_s"] > 0 < decoding["cached_s"]
    # A tile's scores: queries x tile x 4 bytes; all keys at once hold the whole matrix.
    assert [row["score_bytes"] for row in tiles] == [256 * row["tile"] * 4 for row in tiles]
    assert [row["tile"] for row in tiles] == [16, 64, 256]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tile", [1, 7, 16, 40, 64])
def test_any_tile_width_gives_the_one_shot_result(tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Scores that grow from tile to tile: every tile brings a new maximum, which is what rescaling is for.
    q, k, v = (torch.randn(40, 8, generator=generator) for _ in range(3))
    k = k * torch.linspace(1, 30, 40)[:, None]
    want = torch.softmax(q @ k.T / 8**0.5, dim=-1) @ v
    got, _ = tiled_attention(q, k, v, tile)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("arguments", "said"), [(["--new-tokens", "1"], "at least 2"), (["--keys", "x"], "integer")])
def test_a_bad_argument_is_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err
