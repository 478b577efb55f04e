"""`python -m evals.needle`: what a model finds again through a cache, by depth and context.

A line is planted in other text and asked for at the end; everything is read through the cache in chunks. Reports, for
every cell, how many answer tokens the model would choose, how many answers come back whole, and the log-likelihood of
the answer, beside the unquantized cache on the same prompts. Small models of code copy an assignment; models from the
hub are asked for a passkey. Under `accelerate launch -m evals.needle` every process reads its share of the cells.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.outliers import add_outliers
from evals._common.prompts import add_text_arguments, load_texts, text_facts
from evals._common.reading import Scores, read_segments
from evals._common.rows import append_rows, provenance
from evals._common.screen import progress, show_table
from evals._common.shards import Shard, join_shards
from evals._common.sides import Side, accepted_sides, add_sides_argument, lossy_sides, parse_side
from evals.needle.plot import plot_maps
from evals.needle.prompts import TASKS, Prompts, make_prompts


class Cell(NamedTuple):
    """One side's finds at one context and depth; all are means over the samples."""

    side: Side
    context: int
    depth: float
    token_accuracy: float
    exact: float
    log_likelihood: float  # nats a token of the answer


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("evals.needle", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser, part="verdict")
    add_sides_argument(parser, *lossy_sides())
    parser.add_argument("--baseline", default="dynamic+sdpa", help="cache+attention (%(default)s)")
    parser.add_argument("--task", choices=sorted(TASKS), help="assignment for the bundled model, else passkey")
    parser.add_argument(
        "--contexts", nargs="+", type=at_least(1), default=[128, 256, 512, 1024], help="tokens (128 256 512 1024)"
    )
    parser.add_argument("--depths", type=at_least(2), default=5, help="how many, from 0 to 100 %% (%(default)s)")
    parser.add_argument("--samples", type=at_least(1), default=8, help="needles, each in every cell (%(default)s)")
    parser.add_argument("--chunk", type=at_least(1), default=16, help="tokens fed at once (%(default)s)")
    parser.add_argument("--outliers", action="store_true", help="add large key biases to the model")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the needles (%(default)s)")
    parser.add_argument("--plot", type=Path, help="picture to write (beside --out)")
    add_output_argument(parser, "needle.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write."""
    args.task = args.task or ("assignment" if args.model is None else "passkey")
    sides = list(dict.fromkeys(parse_side(text) for text in [args.baseline, *args.sides]))
    shard = join_shards(args)
    subject = load_subject(args)
    if args.outliers:
        subject = subject._replace(name=f"{subject.name} with outliers", model=add_outliers(subject.model))
    sides = accepted_sides(subject.model, sides)
    depths = [step / (args.depths - 1) for step in range(args.depths)]
    cells_of = make_prompts(subject, load_texts(args), args.task, args.contexts, depths, args.samples, args.seed)
    check_length(subject, max(args.contexts))
    cells = [cell for of_prompts in _measure(args, subject, sides, cells_of, shard) for cell in of_prompts]
    if shard.is_main:
        _show(args, subject, sides, cells)
        facts = {"processes": shard.num_processes, **provenance(subject.model.device)}
        append_rows(args.out, [{**_row(args, subject, side, cells), **facts} for side in sides])
        maps = {str(side): _map(args, side, cells) for side in sides}
        title = f"{subject.name}, {args.dtype}, {args.task}, {args.samples} needles a cell"
        plot_maps(args.plot or args.out.with_suffix(".png"), title, args.contexts, depths, maps)
    return 0


def _measure(
    args: argparse.Namespace, subject: Subject, sides: Sequence[Side], prompts: Sequence[Prompts], shard: Shard
) -> list[list[Cell]]:
    own = []
    mine = shard.of(prompts)
    with progress(len(mine)) if shard.is_main else nullcontext(lambda doing: None) as advance:
        for each in mine:
            readings = read_segments(subject.model, sides, each.ids, args.chunk)
            own.append([_cell(s, each, reading.scores) for s, reading in zip(sides, readings, strict=True)])
            advance(f"{each.context} tokens, depth {each.depth:.0%}")
    return shard.gather(own)


def _cell(side: Side, prompts: Prompts, scores: Scores) -> Cell:
    """Score the answers: the last tokens of each row."""
    right = [row[-length:].float() for row, length in zip(scores.is_right, prompts.answer_lens, strict=True)]
    nll = [row[-length:] for row, length in zip(scores.nll, prompts.answer_lens, strict=True)]
    return Cell(
        side=side,
        context=prompts.context,
        depth=prompts.depth,
        token_accuracy=_mean([float(row.mean()) for row in right]),
        exact=_mean([float(row.all()) for row in right]),
        log_likelihood=-_mean([float(row.mean()) for row in nll]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of(side: Side, cells: Sequence[Cell], context: int | None = None) -> list[Cell]:
    return [cell for cell in cells if cell.side == side and context in (None, cell.context)]


def _map(args: argparse.Namespace, side: Side, cells: Sequence[Cell]) -> list[list[float]]:
    return [[cell.token_accuracy for cell in _of(side, cells, context)] for context in args.contexts]


def _row(args: argparse.Namespace, subject: Subject, side: Side, cells: Sequence[Cell]) -> dict[str, Any]:
    own = _of(side, cells)
    return {
        "eval": "needle",
        "model": subject.name,
        "side": str(side),
        "baseline": args.baseline,
        "task": args.task,
        "dtype": args.dtype,
        **text_facts(args),
        "outliers": args.outliers,
        "chunk": args.chunk,
        "samples": args.samples,
        "seed": args.seed,
        "token_accuracy": _mean([cell.token_accuracy for cell in own]),
        "exact": _mean([cell.exact for cell in own]),
        "log_likelihood": _mean([cell.log_likelihood for cell in own]),
        "cells": [{name: value for name, value in cell._asdict().items() if name != "side"} for cell in own],
    }


def _show(args: argparse.Namespace, subject: Subject, sides: Sequence[Side], cells: Sequence[Cell]) -> None:
    lines = []
    for context in [*args.contexts, None]:
        for side in sides:
            own, base = _of(side, cells, context), _of(sides[0], cells, context)
            likelihood = _mean([cell.log_likelihood for cell in own])
            lines.append(
                [
                    side,
                    context or "all",
                    f"{_mean([cell.token_accuracy for cell in own]):.1%}",
                    f"{_mean([cell.exact for cell in own]):.1%}",
                    f"{likelihood:.3f}",
                    f"{likelihood - _mean([cell.log_likelihood for cell in base]):+.3f}",
                ]
            )
    columns = ["side", "context", "tokens right", "answers right", "log-likelihood", "Δ"]
    title = f"{subject.name} in {args.dtype}, {args.task}: {args.samples} needles at {args.depths} depths"
    show_table(title, columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and give its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
