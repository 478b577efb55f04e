"""Runner of the evals whose rows are missing, each in its own process."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch


class Job(NamedTuple):
    """An eval, with its command lines for full runs and for a quick one; `rows` is the file that they append to."""

    name: str
    full: tuple[str, ...]
    quick: str
    rows: str
    needs_cuda: bool = False


_SPEED_SIDES = "dynamic+sdpa static+sdpa paged+hf_kvopt int8+hf_kvopt int4+hf_kvopt transformers_fp8+sdpa"
# The full runs give every figure of docs/results.md.
JOBS = (
    Job("why", ("",), "--new-tokens 40 --keys 512", "why.json"),
    Job("equality", ("",), "--scenarios greedy padded --new-tokens 12", "equality.json"),
    Job(
        "speed",
        (f"--shape bench --contexts 128 8192 --sides {_SPEED_SIDES}",),
        "--shape tiny --contexts 128 --steps 8 --repeats 2 --new-tokens 0 --no-peak",
        "speed-cpu.json",
    ),
    Job("perplexity", ("", "--outliers"), "--context 129 --segments 2", "perplexity.json"),
    Job("needle", ("",), "--contexts 128 --depths 2 --samples 1 --sides int8+hf_kvopt int4+hf_kvopt", "needle.json"),
    Job("memory", ("",), "--formats native int8 --steps 3", "memory.json"),
    Job("prefix", ("",), "--lengths 512 --batches 1 --hits 0 0.95 --repeats 2", "prefix-cpu.json"),
    Job("fragmentation", ("",), "--requests 60", "fragmentation.json"),
    Job(
        "acceptance",
        ("--batches 1 4 8 --prompts 8 --new-tokens 96 --repeats 2",),
        "--batches 1 --prompts 1 --new-tokens 24 --repeats 1 --temperatures 0",
        "acceptance.json",
    ),
    Job("kernels", ("",), "", "kernels-aot.json"),
    Job("gpu", ("",), "", "gpu.json", needs_cuda=True),
)


class Outcome(NamedTuple):
    """Result of a job."""

    name: str
    command: str
    detail: str  # empty if it ran
    seconds: float


def run_jobs(
    jobs: Sequence[Job], folder: Path, is_quick: bool, deadline: float, say: Callable[[str], object]
) -> list[Outcome]:
    """Run jobs one after another until `deadline` (time.monotonic()); rows go to files in `folder`."""
    return [
        _run(job, options.split(), folder, is_quick, deadline, say)
        for job in jobs
        for options in ((job.quick,) if is_quick else job.full)
    ]


def _run(
    job: Job, options: list[str], folder: Path, is_quick: bool, deadline: float, say: Callable[[str], object]
) -> Outcome:
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
    # Exit status 1 means that a goal was missed: the rows are there.
    if done.returncode in (0, 1) and (folder / job.rows).exists():
        return Outcome(job.name, shown, "", seconds)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return Outcome(job.name, shown, f"exit status {done.returncode}: {lines[-1][:200] if lines else ''}", seconds)


def _cannot(job: Job, is_quick: bool) -> str:
    """Return why a job cannot run here; empty if it can."""
    if find_spec(f"evals.{job.name}") is None:
        return "this eval is not part of this checkout"
    if job.needs_cuda and not torch.cuda.is_available():
        return "no CUDA device here"
    if job.name == "kernels" and is_quick:
        return "compiles for minutes: run it by itself"
    return ""
