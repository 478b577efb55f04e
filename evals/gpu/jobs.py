"""Checks in parallel processes, because most of their time is compilation; a process that dies is one failed row.

A kernel takes seconds to compile, there are more than a hundred checks, and a GPU machine has many cores: each worker
compiles what its own checks launch, on the same GPU. A CUDA error makes its process unusable, so the worker is replaced
and no other check is lost. Compiled code lands in the caches on disk, where the timed parts, alone on the GPU
afterwards, find it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from evals.gpu.time import Bench

Row = dict[str, Any]
BYTES_PER_WORKER = 8 * 2**30  # of the GPU's memory: a context, a model of 1.2 billion parameters and its cache


class Job(NamedTuple):
    """One check, or one call whose compiled code a timed part needs; picklable."""

    name: str
    function: Callable[..., Row]  # of a Bench and the arguments
    args: tuple[Any, ...] = ()
    covers: str = ""  # not to be timed if this fails; "" for a call that only fills the compilers' caches

    def row(self, result: Row) -> Row:
        """Return a result under the job's name; only a check can fail."""
        if self.covers:
            return {"check": self.name, "covers": self.covers, **result}
        return {"warm": self.name, **{key: value for key, value in result.items() if key != "passed"}}


class _Worker(NamedTuple):
    process: Any
    connection: Connection


def count_workers(bench: Bench, num_jobs: int) -> int:
    """Return the number of processes that share the machine."""
    if bench.rehearsal:
        return 2
    return max(1, min(14, os.cpu_count() or 1, bench.free_bytes() // BYTES_PER_WORKER, num_jobs))


def run_jobs(bench: Bench, jobs: list[Job]) -> Iterator[Row]:
    """Yield a row for each job as it ends; jobs that have not ended by the deadline are skipped."""
    waiting = deque(jobs)
    workers = [_start(bench) for _ in range(count_workers(bench, len(jobs)))]
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    try:
        for worker in workers:
            _give(worker, waiting, busy)
        while busy and not bench.is_late:
            for connection in wait(list(busy), timeout=max(0.0, bench.deadline - time.monotonic())):
                worker, job = busy.pop(connection)  # type: ignore[call-overload]  # wait() knows only objects
                row = _result(worker)
                yield job.row(row)
                if waiting and (worker.process.exitcode is not None or "CUDA" in row.get("error", "")):
                    worker.process.kill()
                    worker = _start(bench)
                    workers.append(worker)
                _give(worker, waiting, busy)
        for job in (*(job for _, job in busy.values()), *waiting):
            yield job.row({"skipped": "out of time"})
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _start(bench: Bench) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, bench), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, waiting: deque[Job], busy: dict[Connection, tuple[_Worker, Job]]) -> None:
    if waiting:
        job = waiting.popleft()
        busy[worker.connection] = (worker, job)
        # A worker that has died is noticed when its answer is read.
        with contextlib.suppress(OSError):
            worker.connection.send(job)


def _result(worker: _Worker) -> Row:
    try:
        row: Row = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        return {"passed": False, "error": f"the process ended with exit code {worker.process.exitcode}"}
    return row


def _work(connection: Connection, bench: Bench) -> None:
    """Answer jobs until the parent is gone."""
    # Read when the compiler is first imported: one compile process for each worker is enough.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        started = time.perf_counter()
        try:
            with torch.no_grad():
                row = job.function(bench, *job.args)
        except Exception as error:  # any failure is one failed row, not the end of the run
            row = {"passed": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        # The GPU is shared: another job may need what this one left cached.
        with contextlib.suppress(RuntimeError):
            bench.free_bytes()
        connection.send(row | {"seconds": round(time.perf_counter() - started, 1)})
