"""Runs the evals whose rows are missing, each in a process of its own."""

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch


class Job(NamedTuple):
    """An eval, with what it is called with in full and in a hurry; `rows` is the file that it appends to."""

    name: str
    full: tuple[str, ...]
    quick: tuple[str, ...]
    rows: str
    needs_cuda: bool = False


JOBS = (
    Job("why", (), ("--new-tokens", "40", "--keys", "512"), "why.json"),
    Job("equality", (), ("--scenarios", "greedy", "padded", "--new-tokens", "12"), "equality.json"),
    Job(
        "speed",
        ("--shape", "bench", "--contexts", "128", "8192"),
        ("--shape", "tiny", "--contexts", "128", "--steps", "8", "--repeats", "2", "--new-tokens", "0", "--no-peak"),
        "speed-cpu.json",
    ),
    Job("perplexity", (), ("--context", "129", "--segments", "4"), "perplexity.json"),
    Job("needle", (), ("--contexts", "256", "--depths", "2", "--samples", "2"), "needle.json"),
    Job(
        "prefix",
        (),
        ("--lengths", "256", "--batches", "1", "--hits", "0", "0.95", "--repeats", "2"),
        "prefix-cpu.json",
    ),
    Job("fragmentation", (), ("--requests", "60"), "fragmentation.json"),
    Job("acceptance", (), (), "acceptance.json"),
    Job("kernels", (), (), "kernels-aot.json"),
    Job("gpu", (), (), "gpu.json", needs_cuda=True),
)


class Outcome(NamedTuple):
    """What became of a job."""

    name: str
    command: str
    detail: str  # empty where it ran
    seconds: float


def run_jobs(
    jobs: list[Job], folder: Path, is_quick: bool, deadline: float, say: Callable[[str], object]
) -> list[Outcome]:
    """Run jobs one after another until `deadline` (time.monotonic()); rows go to files in `folder`."""
    return [_run(job, folder, is_quick, deadline, say) for job in jobs]


def _run(job: Job, folder: Path, is_quick: bool, deadline: float, say: Callable[[str], object]) -> Outcome:
    options = [*(job.quick if is_quick else job.full)]
    command = [sys.executable, "-m", f"evals.{job.name}", *options]
    shown = " ".join(["python", *command[1:]])
    missing = _cannot(job, is_quick)
    if missing or time.monotonic() >= deadline:
        return Outcome(job.name, shown, missing or "no time left", 0.0)
    if job.rows not in ("kernels-aot.json", "gpu.json"):
        command += ["--out", str(folder / job.rows)]
    say(job.name)
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline - start, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(job.name, shown, "stopped: the time was up", time.monotonic() - start)
    seconds = time.monotonic() - start
    # 1 is an eval's way to say that a goal was missed: its rows are there.
    if done.returncode in (0, 1) and (folder / job.rows).exists():
        return Outcome(job.name, shown, "", seconds)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return Outcome(job.name, shown, f"exit status {done.returncode}: {lines[-1][:200] if lines else ''}", seconds)


def _cannot(job: Job, is_quick: bool) -> str:
    """Why a job cannot be run here; empty if it can."""
    if find_spec(f"evals.{job.name}") is None:
        return "this eval is not part of this checkout"
    if job.needs_cuda and not torch.cuda.is_available():
        return "no CUDA device here"
    if job.name == "kernels" and is_quick:
        return "compiles for minutes: run it by itself"
    return ""
