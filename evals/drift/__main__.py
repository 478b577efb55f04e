"""`python -m evals.drift`: long greedy answers through quantized caches, against an unquantized one.

Reports, for every side, the first token that differs from the baseline's answer, the share of places with the same
token, and the KL divergence along the baseline's answer in each quarter of it: errors that add up grow from quarter to
quarter. In float32 a cache that loses nothing writes every token of the baseline.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.prompts import add_text_arguments, load_texts, text_facts
from evals._common.rows import append_rows, provenance
from evals._common.screen import progress, show_table
from evals._common.sides import accepted_sides, add_sides_argument, lossy_sides, parse_side
from evals.drift.measure import Drift, by_quarter, measure_drift
from evals.drift.plot import plot_drift
from evals.perplexity.segments import make_segments


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("evals.drift", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser, part="verdict")
    add_sides_argument(parser, *lossy_sides())
    parser.add_argument("--baseline", default="dynamic+sdpa", help="cache+attention (%(default)s)")
    parser.add_argument("--prompts", type=at_least(1), default=4, help="answers written at once (%(default)s)")
    parser.add_argument("--prompt-len", type=at_least(1), default=256, help="tokens (%(default)s)")
    parser.add_argument("--new-tokens", type=at_least(8), default=1000, help="of each answer (%(default)s)")
    parser.add_argument("--chunk", type=at_least(1), default=16, help="tokens fed at once when reading (%(default)s)")
    parser.add_argument("--plot", type=Path, help="picture to write (beside --out)")
    add_output_argument(parser, "drift.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write."""
    sides = list(dict.fromkeys(parse_side(text) for text in [args.baseline, *args.sides]))
    subject = load_subject(args)
    check_length(subject, args.prompt_len + args.new_tokens)
    sides = accepted_sides(subject.model, sides)
    prompts = make_segments(subject, load_texts(args), args.prompt_len, args.prompts)[: args.prompts]
    drifts: list[Drift] = []
    with progress(len(sides) - 1) as advance:
        # Side by side with the baseline, so that logits of two sides are held and not of all.
        for side in sides[1:]:
            both = _measured(args, subject, [sides[0], side], prompts)
            drifts += both if not drifts else both[1:]
            advance(str(side))
    _show(args, subject, drifts)
    facts = provenance(subject.model.device)
    append_rows(args.out, [{**_row(args, subject, drift), **facts} for drift in drifts])
    title = f"{subject.name}, {args.dtype}: {args.new_tokens} greedy tokens behind {args.prompt_len}"
    curves = {str(drift.side): drift.forced.kl.double().mean(dim=0).tolist() for drift in drifts[1:]}
    plot_drift(args.plot or args.out.with_suffix(".png"), title, curves)
    return 0


def _measured(args: argparse.Namespace, subject: Subject, sides: Sequence[Any], prompts: Tensor) -> list[Drift]:
    torch.manual_seed(0)
    return measure_drift(subject.model, sides, prompts, args.new_tokens, args.chunk)


def _row(args: argparse.Namespace, subject: Subject, drift: Drift) -> dict[str, Any]:
    return {
        "eval": "drift",
        "model": subject.name,
        "side": str(drift.side),
        "baseline": args.baseline,
        "dtype": args.dtype,
        **text_facts(args),
        "prompts": len(drift.equal),
        "prompt_len": args.prompt_len,
        "new_tokens": args.new_tokens,
        "chunk": args.chunk,
        "first_divergence": drift.first_divergence,
        "equal_share": float(drift.equal.double().mean()),
        "kl_by_quarter": by_quarter(drift.forced.kl),
        "top1_by_quarter": by_quarter(drift.forced.same_top1),
    }


def _show(args: argparse.Namespace, subject: Subject, drifts: Sequence[Drift]) -> None:
    lines = []
    for drift in drifts:
        quarters = [f"{value:.1e}" for value in by_quarter(drift.forced.kl)]
        first = f"{statistics.median(drift.first_divergence):g}"
        top1 = f"{float(drift.forced.same_top1.double().mean()):.2%}"
        lines.append([drift.side, first, f"{float(drift.equal.double().mean()):.1%}", *quarters, top1])
    columns = ["side", "first other token", "equal tokens", "KL, 1st quarter", "2nd", "3rd", "4th", "top-1"]
    title = (
        f"{subject.name} in {args.dtype}: {len(drifts[0].equal)} answers of {args.new_tokens} greedy tokens behind "
        f"{args.prompt_len}, against {args.baseline}; KL and top-1 along its answers"
    )
    show_table(title, columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and give its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
