"""Rung 3 of the proof: correctness, then speed, of everything on one CUDA card, in one call of under nine minutes.

    python -m evals.gpu                  all of it; writes evals/results/gpu-<card>.json and prints a table in Markdown
    python -m evals.gpu --tune           also times other tile sizes of the dense prefill
    python -m evals.gpu --only decode    one part: correct, prefill, decode or generate
    python -m evals.gpu --rehearse       the same code on a CPU under Triton's interpreter, tiny, nothing written

Needs torch, triton and transformers, and nothing else. Each timed row has passed its own comparison with float32 first;
bandwidth and TFLOP/s are counted from bytes and operations and stand beside what the card reaches on a copy and on a
matrix product in the same run. Exits with 1 if a check failed, with 3 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PARTS = ("correct", "prefill", "decode", "generate")
NO_DEVICE = 3

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--tune", action="store_true", help="time other tile sizes too")
    parser.add_argument(
        "--budget", type=float, default=510.0, help="seconds after which nothing new starts (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of each call (%(default)s)")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, on a CPU under the interpreter; no figure is real"
    )
    options = parser.parse_args(arguments)
    if options.rehearse:
        # Before Triton is imported, which is why the parts are imported below.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(
            "evals.gpu needs a CUDA device: torch.cuda.is_available() is False. Nothing was measured, nothing written."
        )
        return NO_DEVICE
    from evals._gpu_time import Bench, card_limits

    device = torch.device("cpu" if options.rehearse else "cuda")
    bench = Bench(device, options.repeats, time.monotonic() + options.budget, options.rehearse)
    limits = card_limits(bench)
    rows: list[Row] = []
    with torch.no_grad():
        for part in options.only or PARTS:
            for row in _part(part, bench, limits, options.tune):
                rows.append({"part": part, **row})
                print(json.dumps(rows[-1], default=str), flush=True)
                _write(rows, limits, bench)
            if part == "correct" and any(not row["passed"] for row in rows):
                print("a check failed: no speed is measured on wrong results")
                break
    print(_markdown(rows, limits))
    return int(any(row.get("passed") is False for row in rows))


def _part(part: str, bench: Any, limits: dict[str, float], tune: bool) -> Iterator[Row]:
    from evals._gpu_correct import check_all
    from evals._gpu_generate import bench_generate
    from evals._gpu_speed import bench_decode, bench_prefill

    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "correct": lambda: check_all(bench),
        "prefill": lambda: bench_prefill(bench, limits, tune),
        "decode": lambda: bench_decode(bench, limits),
        "generate": lambda: bench_generate(bench),
    }
    return parts[part]()


def _write(rows: list[Row], limits: dict[str, float], bench: Any) -> None:
    """Write the whole file after every row: a run that is cut off leaves what it had."""
    if bench.rehearsal:
        return
    from evals._common.rows import provenance

    where = provenance(bench.device)
    name = re.sub(r"[^a-z0-9]+", "-", str(where["device"]).lower()).strip("-")
    path = Path(__file__).parent / "results" / f"gpu-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({**where, "limits": limits, "rows": rows}, indent=1, default=str) + "\n", encoding="utf8"
    )


def _markdown(rows: list[Row], limits: dict[str, float]) -> str:
    """Return the table for the README."""
    lines = [
        f"Copy {limits['copy_gb_s']:.0f} GB/s, bf16 product {limits['matmul_tflop_s']:.0f} TFLOP/s in this run.",
        "",
    ]
    lines += ["| what | ours | share of the card's own | over the best peer |", "|---|---|---|---|"]
    for row in rows:
        ours = row.get("sides", {}).get("ours", {})
        if "ms" in ours:
            rate = f"{ours['tflop_s']:.0f} TFLOP/s" if "tflop_s" in ours else f"{ours['gb_s']:.0f} GB/s"
            keys = ("bench", "head_dim", "batch", "length", "format")
            what = ", ".join(str(row[key]) for key in keys if key in row)
            ratio = "" if row.get("over_best_peer") is None else f"{row['over_best_peer']:.2f}x"
            lines.append(f"| {what} | {rate} | {ours['share']:.0%} | {ratio} |")
        elif "tokens_s" in row:
            what = f"generate, {row['side']}, batch {row['batch']}, prompt {row['prompt']}"
            lines.append(f"| {what} | {row['tokens_s']:.0f} tokens/s | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
