"""The quick start does what its text says, on the bundled model."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


def test_quickstart_gives_the_same_tokens_and_says_what_they_cost(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--new-tokens", "12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")
    assert re.findall(r"^equal .*: +(\w+)$", done.stdout, re.MULTILINE) == ["True", "True"]
    assert len(re.findall(r"tokens/s, +[\d.]+ KiB of KV", done.stdout)) == 2
