"""`python -m evals.report`: every claim with its goal, measurement, place and date, on one page.

Rows are collected from evals/results; evals without rows there are run. `--quick` runs them small, within five minutes
on a CPU, and keeps their rows apart (folder `quick`), because they prove little more than that an eval runs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from evals._common.cli import RESULTS, Parser, at_least
from evals._common.rows import provenance
from evals._common.screen import progress, show_table
from evals.report.claims import claims_of
from evals.report.figures import fill
from evals.report.jobs import JOBS, Outcome, run_jobs
from evals.report.page import plots_of, to_html, to_markdown
from evals.report.rows import read_results
from evals.report.trade import plot_losses

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
QUICK_SECONDS = 270
FULL_SECONDS = 4 * 3600


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.report", description=(__doc__ or "").split("\n\n")[0])
    names = [job.name for job in JOBS]
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for report.html and report.md (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="run what is missing small, in under five minutes")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="evals that may be run (all)")
    parser.add_argument("--rerun", action="store_true", help="run evals that have rows as well")
    parser.add_argument("--figures", action="store_true", help="also write docs/results.md's figures from full rows")
    parser.add_argument("--budget", type=at_least(0), metavar="SECONDS", help="start nothing after this long")
    return parser


def run(args: argparse.Namespace) -> int:
    """Collect, run what is missing, and write both files; return 1 if a goal was missed."""
    work = args.results / "quick" if args.quick else args.results
    work.mkdir(parents=True, exist_ok=True)
    outcomes = [] if args.collect else _run_missing(args, work)
    rows, faults = read_results(args.results)
    quick_rows, quick_faults = read_results(args.results / "quick", is_quick=True)
    outcomes += [Outcome("results", "", fault, 0.0) for fault in (*faults, *quick_faults)]
    claims = claims_of([*quick_rows, *rows])
    facts = provenance(torch.device("cpu"))
    made = f"made {facts['date']} at {facts['revision']}; torch {facts['torch']}, transformers {facts['transformers']}"
    args.out.mkdir(parents=True, exist_ok=True)
    plot_losses(args.results / "perplexity-models.png", rows)
    plots = plots_of([*quick_rows, *rows], [args.results / "quick", args.results])
    (args.out / "report.html").write_text(to_html(made, claims, plots, outcomes), encoding="utf8")
    (args.out / "report.md").write_text(to_markdown(made, claims, outcomes), encoding="utf8")
    if args.figures:
        PAGE.write_text(fill(PAGE.read_text("utf8"), rows), encoding="utf8")
    missed = [claim for claim in claims if claim.is_met is False]
    title = f"{len(claims)} claims, {sum(c.is_met is True for c in claims)} met, {len(missed)} missed"
    if missed:
        show_table(title, ["missed", "goal", "measured"], [[c.claim, c.goal, c.measured] for c in missed])
    else:
        print(title)
    print(f"{args.out / 'report.html'}\n{args.out / 'report.md'}")
    return int(bool(missed))


def _run_missing(args: argparse.Namespace, work: Path) -> list[Outcome]:
    rows, _ = read_results(args.results)
    known = {row.eval for row in rows}
    wanted = [job for job in JOBS if job.name in args.only and (args.rerun or job.name not in known)]
    seconds = args.budget if args.budget is not None else QUICK_SECONDS if args.quick else FULL_SECONDS
    with progress(sum(1 if args.quick else len(job.full) for job in wanted)) as advance:
        return run_jobs(wanted, work, args.quick, time.monotonic() + seconds, advance)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the report and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
