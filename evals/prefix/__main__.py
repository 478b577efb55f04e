"""`python -m evals.prefix`: time to first token, tokens computed and KV memory, with and without shared prefixes.

Both sides run the same prompts in turns, in one process; figures are medians, ratios medians of paired ratios. A cell
whose tokens differ between the sides is not written, and the exit status is then 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evals._common.cli import RESULTS, Parser, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.prompts import add_text_arguments, load_texts, token_stream
from evals._common.rows import append_rows, provenance, read_rows
from evals._common.screen import megabytes, progress, show_table
from evals.prefix.measure import Cell, Timings, measure
from evals.prefix.plot import draw

HITS = [0.0, 0.5, 0.8, 0.95, 0.99]
# On two CPU cores with the reference model.
LEAST_SPEEDUP, AT_LENGTH, AT_HIT = 10.0, 4096, 0.95
MOST_SLOWDOWN = 1.02


def share(text: str) -> float:
    """Parse a number from 0 to 1; an argument type."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {value}")
    return value


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.prefix", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--lengths", nargs="+", type=at_least(2), default=[1024, 4096], help="tokens (1024 4096)")
    parser.add_argument("--batches", nargs="+", type=at_least(1), default=[1, 4], help="rows (1 4)")
    parser.add_argument("--hits", nargs="+", type=share, default=HITS, help="known parts (0 0.5 0.8 0.95 0.99)")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="%(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to (prefix-<device>.json of the results)")
    parser.add_argument("--plot", type=Path, help="picture of all rows in that file (beside it, .png)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show, write and draw; return 1 if tokens differ."""
    subject = load_subject(args)
    cells = [Cell(n, batch, hit) for n in args.lengths for batch in args.batches for hit in args.hits]
    check_length(subject, max(args.lengths) + 8)
    stream = token_stream(subject, load_texts(args), 3 * max(args.lengths) * (max(args.batches) + 1))
    facts, results = provenance(subject.model.device), {}
    out = args.out or RESULTS / f"prefix-{subject.model.device.type}.json"
    with progress(len(cells)) as advance:
        for cell in cells:
            timings = results[cell] = measure(subject, cell, stream, args.repeats)
            if timings.is_equal:
                append_rows(out, [{**_row(subject, args.dtype, cell, timings), **facts}])
            advance(f"{cell.length} tokens, batch {cell.batch}, {cell.hit:.0%} known")
    append_rows(out, [])  # makes the file even if no cell gave a row
    _show(subject, results)
    latest = {(row["length"], row["batch"], row["hit"]): row for row in read_rows(out)}
    if latest:
        draw(list(latest.values()), args.plot or out.with_suffix(".png"))
    return int(any(not timings.is_equal for timings in results.values()))


def _row(subject: Subject, dtype: str, cell: Cell, timings: Timings) -> dict[str, Any]:
    return {
        "eval": "prefix",
        "model": subject.name,
        "dtype": dtype,
        **cell._asdict(),
        "plain_ms": median(timings.plain_ms),
        "shared_ms": median(timings.shared_ms),
        "shared_over_plain": timings.ratio,
        "plain_tokens": timings.plain_tokens,
        "shared_tokens": timings.shared_tokens,
        "plain_kv_bytes": timings.plain_bytes,
        "shared_kv_bytes": timings.shared_bytes,
        "repeats": len(timings.plain_ms),
        "bar": _bar(cell, timings),
    }


def _bar(cell: Cell, timings: Timings) -> dict[str, Any] | None:
    """Return the bar of a cell, and whether it is met; None for a cell without one."""
    if cell.hit == 0:
        return {"most": MOST_SLOWDOWN, "is_met": timings.ratio <= MOST_SLOWDOWN}
    if (cell.length, cell.batch, cell.hit) == (AT_LENGTH, 1, AT_HIT):
        return {"most": 1 / LEAST_SPEEDUP, "is_met": timings.ratio <= 1 / LEAST_SPEEDUP}
    return None


def _show(subject: Subject, results: dict[Cell, Timings]) -> None:
    columns = (
        "prompt", "batch", "known", "plain ms", "shared ms", "shared/plain", "bar", "tokens", "shared", "KV plain",
        "shared and kept", "tokens equal",
    )  # fmt: skip
    lines = []
    for cell, timings in results.items():
        bar = _bar(cell, timings)
        lines.append(
            (
                cell.length, cell.batch, f"{cell.hit:.0%}", f"{median(timings.plain_ms):.1f}",
                f"{median(timings.shared_ms):.1f}", f"{timings.ratio:.3f}",
                "" if bar is None else f"<= {bar['most']:.2f} {'met' if bar['is_met'] else 'MISSED'}",
                timings.plain_tokens, timings.shared_tokens, megabytes(timings.plain_bytes),
                megabytes(timings.shared_bytes), timings.is_equal,
            )
        )  # fmt: skip
    show_table(f"first token of {subject.name}", columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
