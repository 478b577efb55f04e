"""The long-context example runs, and its quantized caches take the share of memory that they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quantized_long_context.py"


def test_quantized_caches_take_less_memory_for_the_same_text(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--tokens", "400", "--new-tokens", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\S+) +([\d.]+) MiB for 400 tokens, (\d+) of (\d+) alike", done.stdout, re.MULTILINE)
    names, sizes, equal, made = zip(*lines, strict=True)
    assert names == ("native", "int8", "k8v4", "int4")
    native, int8, k8v4, int4 = map(float, sizes)
    assert int8 < 0.3 * native  # of float32
    # Of so short a text sealed formats keep the most part exact; tests/plan/test_sealed.py has long ones.
    assert int4 < k8v4 < native
    assert equal[0] == made[0] == "8"
