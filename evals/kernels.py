"""Rung 2 of the proof: compile every kernel for cards that are not there, and read the machine code.

    python -m evals.kernels                    a quick subset for sm_80, sm_90, sm_100 and gfx942
    python -m evals.kernels --all              every kernel, format, configuration column and pattern
    python -m evals.kernels --card sm_90 --op flash_prefill

A line per kernel: registers a thread, bytes spilled, KiB of shared memory, blocks that fit on one multiprocessor
(an estimate from registers, shared memory and threads), instructions, and the matrix instruction that was found.
Exits with 1 if a kernel does not compile, spills (inside a loop, or more than 16 bytes outside), needs more shared
memory than the card has, or computes its products without the matrix instruction that it is meant to use.

Tiles of fewer than 64 rows (decode, short drafts) are expected on the warp-level instruction (HMMA): the warpgroup's
(HGMMA, UTCHMMA) starts at 64 rows. float32 products are meant to be exact and use none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

# Fusion was the default up to Triton 3.9; said aloud so that newer versions compile the same code.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

from evals._gpu_cases import Case, launches_of, sweep
from evals._gpu_compile import CARDS, Card, Compiled, compile_launch
from hf_kvopt.kernels.launch import Launch

# ptxas parks a value or two before a loop to fit one more block on a multiprocessor; inside a loop none may be.
TOLERATED_SPILL = 16
DEFAULT_CARDS = ("sm_80", "sm_90", "sm_100", "gfx942")


def expected_matrix(case: Case, launch: Launch, card: Card) -> tuple[str, ...]:
    """Return the instructions of which one must be found; none for kernels without a half-precision product."""
    if case.op in ("store_kv", "merge_state") or case.dtype == torch.float32:
        return ()
    if card.gpu.backend == "hip" or launch.args["BLOCK_M"] >= 64:
        return card.matrix
    return ("HMMA",)


def complaints(case: Case, launch: Launch, compiled: Compiled, card: Card) -> list[str]:
    """Return what is wrong with a compiled kernel."""
    found = []
    if compiled.spills_in_loops or compiled.spill_bytes > TOLERATED_SPILL:
        found.append(f"spills {compiled.spill_bytes} bytes, {compiled.spills_in_loops} accesses in loops")
    if compiled.shared_bytes > card.shared_per_block:
        found.append(f"needs {compiled.shared_bytes} of {card.shared_per_block} bytes of shared memory")
    wanted = expected_matrix(case, launch, card)
    if wanted and not any(name in compiled.matrix for name in wanted):
        found.append(f"no {' or '.join(wanted)} in the machine code")
    return found


def check_case(case: Case, card: Card) -> bool:
    """Compile one case, print its line, and return whether nothing was wrong."""
    good = True
    for launch in launches_of(case, card.target):
        started = time.perf_counter()
        try:
            compiled = compile_launch(launch, card)
        except Exception as error:  # whatever a compiler may raise is one failed line, not the end of the table
            print(
                f"{card.name:7} {case.label}  FAILED to compile: {str(error).strip().splitlines()[-1][:160]}",
                flush=True,
            )
            return False
        tile = f"{launch.args['BLOCK_M']}x{launch.args['BLOCK_N']}" if "BLOCK_M" in launch.args else "-"
        options = f"w{launch.options['num_warps']} s{launch.options.get('num_stages', '-')}"
        matrix = " ".join(
            f"{name} {count}" for name, count in compiled.matrix.items() if "MMA" in name or "mfma" in name
        )
        wrong = complaints(case, launch, compiled, card)
        seconds = time.perf_counter() - started
        needs = f"{compiled.registers:4d} reg {compiled.spill_bytes:4d} spill {compiled.shared_bytes / 1024:6.1f} KiB"
        size = f"{compiled.blocks_per_sm:3d} blocks {compiled.num_instructions:6d} instr  {matrix or 'no matrix':14}"
        line = f"{card.name:7} {case.label:58} {tile:>8} {options}  {needs} {size} {seconds:4.1f} s"
        print(f"{line}  {'; '.join(wrong)}".rstrip(), flush=True)
        good = good and not wrong
    return good


def main(arguments: list[str] | None = None) -> int:
    """Compile the chosen cases and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every kernel, format, configuration column and pattern")
    parser.add_argument("--card", action="append", choices=list(CARDS), help="only this card; may be repeated")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    failed = total = 0
    for name in options.card or DEFAULT_CARDS:
        card = CARDS[name]
        for case in sweep(card.target.capability != (8, 0), options.all):
            if options.op is None or case.op in options.op:
                total += 1
                failed += not check_case(case, card)
    print(f"{total - failed} of {total} kernels compiled without a complaint")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
