"""The example trains, loads and reports."""

import re
import sys
from pathlib import Path

import pytest

from hf_kvopt.cli.watch import run_while_busy

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_head.py"


def test_the_example_trains_a_head_that_gets_better():
    done = run_while_busy([sys.executable, EXAMPLE])
    assert done is not None
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss +([\d.]+)  [\d.]+ tokens a step", done.stdout)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
