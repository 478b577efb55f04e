"""The planning example says what fits and what to choose, from the bundled config."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "planning.py"


def test_planning_prints_sizes_capacity_choices_and_code(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes a token", done.stdout)]
    assert len(sizes) == 4
    assert sizes == sorted(sizes, reverse=True)
    assert re.search(r"[\d,]+ tokens a row at batch 16, or [\d,]+ rows of 8k", done.stdout)
    assert len(re.findall(r"because", done.stdout)) == 8
    assert "hf_kvopt.enable(model, cache=" in done.stdout
