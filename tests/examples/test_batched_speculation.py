"""The example of batched speculation writes the same tokens with and without drafts."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "batched_speculation.py"


def test_a_padded_batch_speculates_to_the_same_tokens(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--new-tokens", "24"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal tokens: True" in done.stdout
