"""lm-evaluation-harness scores every cache; a paged one as transformers' own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evals.reference_model import MODEL_PATH

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval", reason="pip install 'hf-kvopt[neighbours]'")
ROOT = Path(__file__).resolve().parents[2]


def test_caches_are_scored(tmp_path: Path) -> None:
    script = ROOT / "examples" / "lm_eval_harness.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    caches = ["DynamicCache", "paged", "int8", "int4"]  # all of them are scored in tests/neighbours
    command = [sys.executable, str(script), str(MODEL_PATH), *caches]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if " choosing " in line}
    assert list(scores) == caches
    assert scores["paged"] == scores["DynamicCache"]
    # Two of three tasks are solved by choice, one word for word: neither all nor none, so that a fault would show.
    assert all(float(value) > 0 for score in scores.values() for value in score[1::2])
