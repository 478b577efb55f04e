"""Rung 1: the files of `triton/` in a few processes of their own, under TRITON_INTERPRET=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))
NUM_PROCESSES = 5  # each takes seconds to start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton/ is collected in this process"),
]


@pytest.mark.parametrize("part", range(NUM_PROCESSES))
def test_kernels_match_their_references(part):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
    command += [str(file) for file in FILES[part::NUM_PROCESSES]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
