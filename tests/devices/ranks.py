"""Start a group of processes on this machine, and collect what each of them found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_S = 240  # a group that takes longer hangs: it takes about 10 s on a quiet machine


def run(jobs: str, models: Path, scratch: Path, num_ranks: int = 2, **environment: str) -> list[dict[str, Any]]:
    """Run jobs of `tests.devices.jobs`, named with commas between them, on `num_ranks` processes.

    Returns:
        For each rank, by job, {"returned": ...} or {"error": "Class: message"}; no entry where the process was killed.
    """
    outs = [scratch / f"rank {rank}.json" for rank in range(num_ranks)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tests.devices.jobs", jobs, str(models)]
    started = []
    for rank, out in enumerate(outs):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        log = out.with_suffix(".log").open("w")
        arguments = [*command, str(out), str(rank), str(num_ranks)]
        started.append(subprocess.Popen(arguments, env={**env, **ranked}, cwd=ROOT, stdout=log, stderr=log))
    try:
        for process in started:
            process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{jobs} hangs: {[process.poll() for process in started]}\n{_logs(outs)}")
    finally:
        for process in started:
            process.kill()
    found = [json.loads(out.read_text()) if out.exists() else {} for out in outs]
    for process, one in zip(started, found, strict=True):
        assert len(one) == len(jobs.split(",")) or process.returncode < 0, _logs(outs)
    return found


def returned(found: list[dict[str, Any]], job: str) -> list[Any]:
    """Return what each rank returned of a job; fail where one of them raised."""
    assert all("returned" in one[job] for one in found), [one[job] for one in found]
    return [one[job]["returned"] for one in found]


def errors(found: list[dict[str, Any]], job: str) -> list[str]:
    """Return the error of each rank that a job ended with; fail where one of them raised none."""
    assert all("error" in one[job] for one in found), [one[job] for one in found]
    return [one[job]["error"] for one in found]


def _logs(outs: list[Path]) -> str:
    return "\n".join(out.with_suffix(".log").read_text()[-3000:] for out in outs)
