"""Rung 2 of the proof: compile every kernel for GPUs that are not present, and read the machine code.

    python -m evals.kernels                    a quick subset for sm_80, sm_90, sm_100 and gfx942
    python -m evals.kernels --all              every tile that can be chosen, each format, size and pattern
    python -m evals.kernels --card sm_90 --op flash_prefill

One line for each kernel: registers of a thread, bytes spilled, KiB of shared memory, blocks that fit on one
multiprocessor (an estimate from registers, shared memory and threads), instructions in all and in the loop over whole
tiles, and the matrix instructions found. `--all` writes `results/kernels-aot.json` as it goes and prints a table in
Markdown; a kernel in that file with the same source, options and compiler is not compiled again, so a run can be
resumed.

Exits with 1 if a kernel does not compile, spills a single byte, needs more shared memory than the card has, or computes
its products without the intended matrix instruction. Tiles of fewer than 64 rows (decode, short drafts) are expected
to use the warp-level instruction (HMMA): the warpgroup's (HGMMA, UTCHMMA) starts at 64 rows. float32 products are meant
to be exact and use none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Fusion was the default up to Triton 3.9; set explicitly so that newer versions compile the same code.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton

from evals.gpu.cases import Case, launches_of, sweep
from evals.gpu.compile import CARDS, Card, Compiled, compile_launch, launch_key
from hf_kvopt.kernels.triton.launch import Launch

DEFAULT_CARDS = ("sm_80", "sm_90", "sm_100", "gfx942")
RESULTS = Path(__file__).parent / "results" / "kernels-aot.json"

Row = dict[str, Any]


def expected_matrix(case: Case, launch: Launch, card: Card) -> tuple[str, ...]:
    """Return instructions of which one must be found; none for kernels without a half-precision product."""
    if case.op in ("store_kv", "merge_state", "seal_blocks") or case.dtype == torch.float32:
        return ()
    if card.gpu.backend == "hip" or launch.args["BLOCK_M"] >= 64:
        return card.matrix
    return ("HMMA",)


def complaints(case: Case, launch: Launch, compiled: Compiled, card: Card) -> list[str]:
    """Return the faults of a compiled kernel."""
    found = []
    if compiled.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} bytes")
    if compiled.shared_bytes > card.shared_per_block:
        found.append(f"needs {compiled.shared_bytes} of {card.shared_per_block} bytes of shared memory")
    wanted = expected_matrix(case, launch, card)
    if wanted and not any(name in compiled.matrix for name in wanted):
        found.append(f"no {' or '.join(wanted)} in the machine code")
    return found


def row_of(case: Case, launch: Launch, card: Card, key: str) -> Row:
    """Compile one launch and return its row."""
    row: Row = {"key": key, "card": card.name, "op": case.op, "case": case.label.strip()}
    if "BLOCK_M" in launch.args:
        row["tile"] = [launch.args["BLOCK_M"], launch.args["BLOCK_N"]]
    row |= {"warps": launch.options["num_warps"], "stages": launch.options.get("num_stages")}
    started = time.perf_counter()
    try:
        compiled = compile_launch(launch, card)
    except Exception as error:  # any compiler failure is one failed line, not the end of the table
        return row | {"wrong": [f"does not compile: {str(error).strip().splitlines()[-1][:160]}"]}
    row |= compiled._asdict()
    row["matrix"] = {n: count for n, count in compiled.matrix.items() if "MMA" in n or "mfma" in n or n == "UTMALDG"}
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row | {"wrong": complaints(case, launch, compiled, card)}


def line_of(row: Row) -> str:
    """Format a row as a line of text."""
    tile = "x".join(map(str, row.get("tile", [])))
    head = f"{row['card']:7} {row['case']:58} {tile:>8} w{row['warps']} s{row['stages']}"
    if "registers" in row:
        head += f"  {row['registers']:4d} reg {row['spill_bytes']:4d} spill {row['shared_bytes'] / 1024:6.1f} KiB"
        head += (
            f" {row['blocks_per_sm']:3d} blocks {row['num_instructions']:6d} instr {row['loop_instructions']:5d} loop"
        )
        head += "  " + (" ".join(f"{name} {count}" for name, count in row["matrix"].items()) or "no matrix")
    return f"{head}  {'; '.join(row['wrong'])}".rstrip()


def rows_of(cards: list[str], ops: list[str] | None, full: bool, known: dict[str, Row]) -> Iterator[Row]:
    """Yield a row for each kernel, compiled if it is not known; a kernel that two cases share is one row."""
    seen = set()
    for name in cards:
        card = CARDS[name]
        for case in sweep(card.target.capability != (8, 0), full):
            if ops is not None and case.op not in ops:
                continue
            for launch in launches_of(case, card.target):
                key = launch_key(launch, card)
                if key not in seen:
                    seen.add(key)
                    yield known.get(key) or row_of(case, launch, card, key)


def markdown(rows: list[Row]) -> str:
    """Return the table of docs/notes/ahead-of-time.md: one line for each card and op."""
    lines = ["| card | kernel | compiled | most registers | spills | most shared memory | matrix instructions |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for card, op in dict.fromkeys((row["card"], row["op"]) for row in rows):
        good = [row for row in rows if (row["card"], row["op"]) == (card, op) and "registers" in row]
        names = sorted({name for row in good for name in row["matrix"] if name != "UTMALDG"})
        shared = max(row["shared_bytes"] for row in good) / 1024
        spills = sum(row["spill_bytes"] > 0 for row in good)
        most = max(row["registers"] for row in good)
        lines.append(f"| {card} | {op} | {len(good)} | {most} | {spills} | {shared:.0f} KiB | {', '.join(names)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile the chosen cases and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every tile that can be chosen; writes the results")
    parser.add_argument("--card", action="append", choices=list(CARDS), help="only this card; may be repeated")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    whole = options.all and not options.card and not options.op
    known = {row["key"]: row for row in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    rows: list[Row] = []
    for row in rows_of(options.card or list(DEFAULT_CARDS), options.op, options.all, known):
        rows.append(row)
        print(line_of(row), flush=True)
        if options.all and row["key"] not in known:
            known[row["key"]] = row
            _write(list(known.values()))
    wrong = sum(bool(row["wrong"]) for row in rows)
    if whole:
        _write(rows)
        print(markdown(rows))
    print(f"{len(rows) - wrong} of {len(rows)} kernels compiled without a complaint")
    return int(wrong > 0)


def _write(rows: list[Row]) -> None:
    """Write the rows; those of older sources stay until a complete run has replaced them."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    head = {
        "triton": triton.__version__,
        "date": date,
        "cpu_seconds": round(sum(row.get("seconds", 0) for row in rows)),
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + lines + "\n]}\n", encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
