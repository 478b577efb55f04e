"""`python -m evals.speed`: prefill, decode step, generate() and peak memory of sides in one process.

Sides run interleaved, a few steps at a time, after an equality check that also warms up; figures are medians. No row is
written for a side whose logits differ from the first side's, and the exit status is then 1.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from torch import Tensor

from evals._common.cli import RESULTS, Parser, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.prompts import add_text_arguments, load_texts, token_stream
from evals._common.rows import append_rows, provenance
from evals._common.screen import Advance, megabytes, progress, show_table
from evals._common.sides import Side, add_sides_argument, parse_side
from evals.speed.bars import DYNAMIC, OURS, STATIC, Verdict, judge
from evals.speed.measure import Timings, differing_sides, median_ratio, time_sides
from evals.speed.peak import peak_of
from evals.speed.workload import Workload


class Result(NamedTuple):
    """Result of one workload: figures of the sides that agree, faults of the others."""

    work: Workload
    timings: Mapping[Side, Timings]
    peaks: Mapping[Side, int]
    faults: Mapping[Side, str]


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.speed", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    add_sides_argument(parser, *map(str, (DYNAMIC, STATIC, OURS)))
    parser.add_argument(
        "--contexts", nargs="+", type=at_least(1), default=[128, 2048, 8192], help="tokens (128 2048 8192)"
    )
    parser.add_argument("--batches", nargs="+", type=at_least(1), default=[1], help="rows (1)")
    parser.add_argument("--steps", type=at_least(1), default=32, help="decode steps a repeat (%(default)s)")
    parser.add_argument("--new-tokens", type=at_least(0), default=32, help="of generate(), 0: skip it (%(default)s)")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="%(default)s")
    parser.add_argument("--no-peak", action="store_true", help="skip peak memory, a process a side on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to (speed-<device>.json of the results)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write; return 1 if a side differs."""
    sides = list(dict.fromkeys(parse_side(text) for text in args.sides))
    subject = load_subject(args)
    works = [
        Workload(context=context, batch=batch, steps=args.steps, new_tokens=args.new_tokens)
        for batch in args.batches
        for context in args.contexts
    ]
    check_length(subject, max(work.max_len for work in works))
    facts = provenance(subject.model.device)
    out = args.out or RESULTS / f"speed-{subject.model.device.type}.json"
    with progress(len(works) * len(sides) * (args.repeats + 1)) as advance:
        results, verdicts = [], []
        for work in works:
            result = _measure(args, subject, sides, work, advance)
            judged = judge(work.context, result.timings) if args.shape == "bench" else []
            rows = [*_rows(args, subject, sides, result), *(_bar_row(subject, verdict) for verdict in judged)]
            append_rows(out, [{**row, **facts} for row in rows])  # a run that is cut off keeps them
            results.append(result)
            verdicts += judged
    _show(subject, args.dtype, results)
    _show_bars(verdicts)
    return int(any(result.faults for result in results))


def _measure(
    args: argparse.Namespace, subject: Subject, sides: Sequence[Side], work: Workload, advance: Advance
) -> Result:
    ids = _token_rows(args, subject, work)
    faults = differing_sides(subject, sides, work, ids)
    agreed = [side for side in sides if side not in faults]
    timings = time_sides(subject, agreed, work, ids, args.repeats, advance)
    peaks = {}
    for side in agreed if not args.no_peak else ():
        peaks[side] = peak_of(args, subject, side, work)
        advance(f"{work.context} tokens, batch {work.batch}: memory of {side}")
    return Result(work, timings, peaks, faults)


def _token_rows(args: argparse.Namespace, subject: Subject, work: Workload) -> Tensor:  # [batch, context + steps]
    length = work.context + work.steps
    stream = token_stream(subject, load_texts(args), work.batch * length)
    return stream.view(work.batch, length).to(subject.model.device)


def _rows(args: argparse.Namespace, subject: Subject, sides: Sequence[Side], result: Result) -> list[dict[str, Any]]:
    work, timings = result.work, result.timings
    rows = []
    for side, timing in timings.items():
        rows.append(
            {
                "eval": "speed",
                "model": subject.name,
                "side": str(side),
                "baseline": str(sides[0]),
                "dtype": args.dtype,
                "context": work.context,
                "batch": work.batch,
                "steps": work.steps,
                "new_tokens": work.new_tokens,
                "repeats": args.repeats,
                "prefill_ms": median(timing.prefill_ms),
                "step_ms": median(timing.step_ms),
                "step_ms_mean": mean(timing.step_ms),
                "step_ms_range": [min(timing.step_ms), max(timing.step_ms)],
                "prefill_ratio": median_ratio(timing.prefill_ms, timings[sides[0]].prefill_ms),
                "step_ratio": median_ratio(timing.step_ms, timings[sides[0]].step_ms),
                "generate_tokens_per_s": _tokens_per_s(work, timing),
                "kv_used_bytes": timing.kv.used,
                "kv_reserved_bytes": timing.kv.reserved,
                "peak_bytes": result.peaks.get(side),
            }
        )
    return rows


def _bar_row(subject: Subject, verdict: Verdict) -> dict[str, Any]:
    bar = verdict.bar
    return {
        "eval": "speed-bar",
        "model": subject.name,
        "metric": bar.metric,
        "context": verdict.context,
        "side": str(bar.ours),
        "baseline": str(bar.peer),
        "ratio": verdict.ratio,
        "limit": bar.limit,
        "is_met": verdict.is_met,
    }


def _tokens_per_s(work: Workload, timing: Timings) -> float | None:
    if not timing.generate_ms:
        return None
    return work.batch * work.new_tokens / median(timing.generate_ms) * 1e3


def _show(subject: Subject, dtype: str, results: Sequence[Result]) -> None:
    columns = ["side", "context", "batch", "prefill ms", "step ms", "min-max", "generate tok/s", "KV", "peak"]
    lines = []
    for work, timings, peaks, faults in results:
        for side, timing in timings.items():
            rate = _tokens_per_s(work, timing)
            lines.append(
                [
                    side,
                    work.context,
                    work.batch,
                    f"{median(timing.prefill_ms):.1f}",
                    f"{median(timing.step_ms):.2f}",
                    f"{min(timing.step_ms):.2f}-{max(timing.step_ms):.2f}",
                    "-" if rate is None else f"{rate:.1f}",
                    megabytes(timing.kv.reserved),
                    megabytes(peaks[side]) if side in peaks else "-",
                ]
            )
        lines += [[side, work.context, work.batch, f"DIFFERS: {fault}"] for side, fault in faults.items()]
    show_table(f"{subject.name} in {dtype}, medians; peak is beyond the weights", columns, lines)


def _show_bars(verdicts: Sequence[Verdict]) -> None:
    if verdicts:
        columns = ["side", "metric", "context", "against", "ratio", "limit", "verdict"]
        show_table(
            "bars",
            columns,
            (
                [
                    v.bar.ours,
                    v.bar.metric,
                    v.context,
                    v.bar.peer,
                    f"{v.ratio:.3f}",
                    v.bar.limit,
                    "met" if v.is_met else "MISSED",
                ]
                for v in verdicts
            ),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
