"""The example trains, loads and reports."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_head.py"


def test_the_example_trains_a_head_that_gets_better():
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss +([\d.]+)  [\d.]+ tokens a step", done.stdout)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
