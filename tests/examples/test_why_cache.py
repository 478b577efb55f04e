"""The example counts n (n + 1) / 2 queries against n, and its tiles give the one-shot softmax."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "why_cache.py"


def test_a_hundred_tokens_take_5050_queries_or_100(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"(naive|cached) +([\d,]+) queries +([\d,]+) scores", done.stdout)
    # Scores: a query over itself and all before it, so that the cache's are the naive way's queries.
    assert counts == [("naive", "5,050", "171,700"), ("cached", "100", "5,050")]
    assert "the same tokens: True" in done.stdout
    tiles = re.findall(r"tile +([\d,]+): +([\d.]+) MiB of scores, (\S+) off", done.stdout)
    assert [(int(tile.replace(",", "")), float(size)) for tile, size, _ in tiles] == [
        (16, 0.125), (64, 0.5), (256, 2.0), (1024, 8.0), (2048, 16.0),
    ]  # fmt: skip
    assert all(float(error) < 1e-5 for _, _, error in tiles)
