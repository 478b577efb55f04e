"""`python -m evals.fragmentation`: capacity of a fixed pool that chat completions share, by allocation strategy.

The paged rows drive this library's allocator, block tables and prefix index, without tensors; the others are the
strategies of engines and `generate()` without them. Waste is the share of allocated slots without a token, over time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.rows import append_rows, provenance
from evals._common.screen import progress, show_table
from evals.fragmentation.contiguous import Contiguous, StaticBatch
from evals.fragmentation.paged import Paged
from evals.fragmentation.plot import draw
from evals.fragmentation.simulate import Outcome, Strategy, simulate
from evals.fragmentation.workload import MAX_OUTPUT, MAX_PROMPT
from evals.fragmentation.workload import draw as draw_requests

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
MOST_WASTE, AT_BLOCK_SIZE = 0.04, 16
STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "contiguous, longest": lambda pool: Contiguous(pool, is_max=True),
    "contiguous, power of two": lambda pool: Contiguous(pool, is_max=False),
    "static batch, torch.cat": StaticBatch,
    **{f"paged {size}": partial(Paged, block_size=size) for size in BLOCK_SIZES},
    "paged 16, copy on write": lambda pool: Paged(pool, 16, copies_on_write=True),
    "paged 16, and shared prefixes": lambda pool: Paged(pool, 16, copies_on_write=True, shares_prefixes=True),
}


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.fragmentation", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=at_least(1), default=1000, help="chat completions (%(default)s)")
    parser.add_argument("--pool", type=at_least(4 * (MAX_PROMPT + MAX_OUTPUT)), default=65_536, help="tokens (65536)")
    parser.add_argument("--arrivals", type=float, default=0.5, help="requests a step, on average (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    add_output_argument(parser, "fragmentation.json")
    parser.add_argument("--plot", type=Path, help="picture of this run (beside --out, .png)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Simulate, show, write and draw; return 1 if the bar is missed."""
    requests = draw_requests(args.requests, args.seed, args.arrivals)
    outcomes: dict[str, Outcome] = {}
    with progress(len(STRATEGIES)) as advance:
        for name, make in STRATEGIES.items():
            strategy = make(args.pool)
            outcomes[name] = simulate(strategy, requests)
            if isinstance(strategy, Paged):
                strategy.allocator.check_integrity()
            advance(name)
    rows = [_row(args, name, outcome) for name, outcome in outcomes.items()]
    _show(args, outcomes)
    append_rows(args.out, [{**row, **provenance(torch.device("cpu"))} for row in rows])
    draw(rows, args.plot or args.out.with_suffix(".png"))
    return int(outcomes[f"paged {AT_BLOCK_SIZE}"].waste >= MOST_WASTE)


def _row(args: argparse.Namespace, name: str, outcome: Outcome) -> dict[str, Any]:
    row = {
        "eval": "fragmentation",
        "strategy": name,
        "requests": args.requests,
        "pool_tokens": args.pool,
        "arrivals_per_step": args.arrivals,
        "seed": args.seed,
        **outcome._asdict(),
        "waste": outcome.waste,
    }
    if name == f"paged {AT_BLOCK_SIZE}":
        row["bar"] = {"most": MOST_WASTE, "is_met": outcome.waste < MOST_WASTE}
    return row


def _show(args: argparse.Namespace, outcomes: dict[str, Outcome]) -> None:
    columns = (
        "handed out", "used", "reserved", "waste", "external", "metadata", "peak", "at once", "at most", "steps",
        "put out",
    )  # fmt: skip
    lines = [
        (
            name, f"{o.used / args.pool:.1%}", f"{o.reserved / args.pool:.1%}", f"{o.waste:.2%}",
            f"{o.external / args.pool:.1%}", f"{o.metadata_bytes / 1024:.1f} KiB", f"{o.peak_reserved / args.pool:.0%}",
            f"{o.concurrency:.1f}", o.peak_concurrency, o.steps, o.preemptions,
        )
        for name, o in outcomes.items()
    ]  # fmt: skip
    show_table(f"{args.requests} chat completions over a pool of {args.pool} tokens", columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
