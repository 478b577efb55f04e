"""lm-evaluation-harness scores every cache; a paged one as transformers' own."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_kvopt import KV_FORMATS

pytest.importorskip("lm_eval", reason="pip install 'hf-kvopt[neighbours]'")
ROOT = Path(__file__).resolve().parents[2]


def test_every_cache_is_scored(tmp_path: Path) -> None:
    script = ROOT / "examples" / "lm_eval_harness.py"
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if " choosing " in line}
    formats = [name for name, fmt in KV_FORMATS.items() if not fmt.is_native]
    assert list(scores) == ["DynamicCache", "paged", *formats]
    assert scores["paged"] == scores["DynamicCache"]
    # Two of three tasks are solved by choice, one word for word: neither all nor none, so that a fault would show.
    assert all(float(value) > 0 for score in scores.values() for value in score[1::2])
