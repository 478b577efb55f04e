"""Rung 4 of the proof: correctness, then speed, of everything on one CUDA device, in one call of under nine minutes.

    python -m evals.gpu                  all of it; writes evals/results/gpu-<card>.json and prints a table in Markdown
    python -m evals.gpu --out FOLDER     all of it, written elsewhere
    python -m evals.gpu --tune           also times other tile sizes of the dense prefill
    python -m evals.gpu --only decode    one part: correct, prefill, decode or generate
    python -m evals.gpu --rehearse       the same code on a CPU in Triton's interpreter, tiny; written to --out only

Needs torch, triton and transformers, and nothing else; if transformers is older than our caches need, the kernels are
still checked and timed, and `generate()` is skipped with the reason. The checks run first, in as many processes as the
machine has room for, and also compile what the timed parts need; these then have the GPU to themselves. Whatever a
failed check covers is not timed, and each timed row first passes its own comparison with float32. Bandwidth and TFLOP/s
are counted from bytes and operations and stand beside what the GPU reaches on a copy and a matrix product in the same
run. The file is written after every row, the largest sizes come first, each part gets a share of the remaining time,
and the call ends at --limit even if something hangs. Exits with 1 if a check failed, with 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# part: its share of the time that is left when it starts
PARTS = {"correct": 0.5, "prefill": 0.3, "decode": 0.5, "generate": 1.0}
NO_DEVICE = 3
UNLIMITED_S = 10.0**6

Row = dict[str, Any]


class Report:
    """Rows of a run, in a file that is complete after each of them."""

    def __init__(self, path: Path | None, head: Row, limits: dict[str, float]) -> None:
        self.path, self.head, self.limits = path, head, limits
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Keep, print and write one row."""
        self.rows.append(row)
        print(json.dumps(row, default=str), flush=True)
        if self.path is not None:
            scratch = self.path.with_suffix(".part")
            text = json.dumps({**self.head, "limits": self.limits, "rows": self.rows}, indent=1, default=str)
            scratch.write_text(text + "\n", encoding="utf8")
            scratch.replace(self.path)

    @property
    def status(self) -> int:
        """Exit status: 1 if a check failed."""
        return int(any(row.get("passed") is False for row in self.rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts and return the exit status."""
    options = _parse(arguments)
    if options.rehearse:
        # Set before Triton is imported, which is why the parts are imported below.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(
            "evals.gpu needs a CUDA device: torch.cuda.is_available() is False. Nothing was measured, nothing written."
        )
        return NO_DEVICE
    from evals.gpu.bars import markdown
    from evals.gpu.time import Bench, card_limits

    started = time.monotonic()
    device = torch.device("cpu" if options.rehearse else "cuda")
    bench = Bench(device, options.repeats, started + options.budget, options.rehearse)
    limits = card_limits(bench)
    report = Report(*_where(options, bench), limits)
    watchdog = threading.Timer(options.limit, _give_up, (report,))
    watchdog.daemon = True
    watchdog.start()
    with torch.no_grad():
        for part in options.only or PARTS:
            now = time.monotonic()
            part_bench = bench._replace(deadline=now + PARTS[part] * (bench.deadline - now))
            failed = {row["covers"] for row in report.rows if row.get("passed") is False and "covers" in row}
            for row in _part(part, part_bench, limits, failed, options.tune):
                report.add({"part": part, "at_s": round(time.monotonic() - started, 1), **row})
    watchdog.cancel()
    print(markdown(report.rows, limits))
    return report.status


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="one part; may be repeated")
    parser.add_argument("--tune", action="store_true", help="time other tile sizes too")
    parser.add_argument("--out", type=Path, help="folder of the results file (evals/results)")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new starts (480; rehearsing: none)")
    parser.add_argument("--limit", type=float, help="seconds after which the call ends (530; rehearsing: none)")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of each call (%(default)s)")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, on a CPU under the interpreter; no figure is real"
    )
    options = parser.parse_args(arguments)
    # A rehearsal is judged by what it does: how long a CPU takes says nothing.
    budget, limit = (UNLIMITED_S, UNLIMITED_S) if options.rehearse else (480.0, 530.0)
    options.budget = budget if options.budget is None else options.budget
    options.limit = limit if options.limit is None else options.limit
    return options


def _part(part: str, bench: Any, limits: dict[str, float], failed: set[str], tune: bool) -> Iterator[Row]:
    from evals.gpu.correct import check_jobs
    from evals.gpu.generate import bench_generate
    from evals.gpu.jobs import run_jobs
    from evals.gpu.speed import bench_decode, bench_prefill, warm_jobs

    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "correct": lambda: run_jobs(bench, check_jobs(bench) + warm_jobs(bench)),
        "prefill": lambda: bench_prefill(bench, limits, failed, tune),
        "decode": lambda: bench_decode(bench, limits, failed),
        "generate": lambda: bench_generate(bench, failed),
    }
    return parts[part]()


def _where(options: argparse.Namespace, bench: Any) -> tuple[Path | None, Row]:
    """Return the results file, and the setup that its rows were measured on."""
    from evals._common.rows import provenance

    head = provenance(bench.device)
    folder = options.out or (None if bench.rehearsal else Path(__file__).parents[1] / "results")
    if folder is None:
        return None, head
    folder.mkdir(parents=True, exist_ok=True)
    name = "rehearsal" if bench.rehearsal else re.sub(r"[^a-z0-9]+", "-", str(head["device"]).lower()).strip("-")
    return folder / f"gpu-{name}.json", head


def _give_up(report: Report) -> None:
    """Print the table and end the process, whatever it waits for: the rows are written."""
    from evals.gpu.bars import markdown

    print(markdown(list(report.rows), report.limits), "\nstopped at the time limit", flush=True)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(report.status)


if __name__ == "__main__":
    sys.exit(main())
