"""`python -m evals.policies`: what each eviction policy loses, by budget, beside the cache that keeps all.

Three tasks, each with a prompt that is read in one forward (by `Hierarchical` in eight) and shrinks: perplexity of the
last quarter of a text, a needle at several depths whose question ends the prompt, and one of several keys. The memory
that is held at the end is counted by the allocator. The question is part of the prompt: policies that go by the last
queries know it.

`--stream TOKENS` measures something else: that time and memory of a token stay flat, see `evals.policies.stream`.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hf_kvopt
from evals._common.cli import RESULTS, Parser, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.prompts import add_text_arguments, load_texts, text_facts
from evals._common.reading import read_segments
from evals._common.rows import append_rows, provenance
from evals._common.screen import progress, show_table
from evals.needle.prompts import TASKS, make_prompts
from evals.perplexity.segments import make_segments
from evals.policies.plot import draw
from evals.policies.sides import POLICIES, WHOLE, PolicySide, make_side
from evals.policies.stream import run_stream

# At half the memory, or half the heads; no perplexity is asked of policies that go by heads.
AT_BUDGET, MOST_POINTS = 0.5, 0.01
MOST_PERPLEXITY = {"SnapKV": 1.01, "ExpectedAttention": 1.01, "DuoAttention": None}
_EVERY = 600  # characters of text between two keys


class Sums(NamedTuple):
    """Results of a side in one task, summed over rows."""

    score: float  # nats, or answer tokens that are right
    num_tokens: int
    held: int  # bytes at the ends


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.policies", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser, part="verdict")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="all of them")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.25, 0.5, 0.75], help="shares of the prompt")
    parser.add_argument("--context", type=at_least(64), default=1024, help="tokens of each text (%(default)s)")
    parser.add_argument("--segments", type=at_least(1), default=8, help="texts of the perplexity (%(default)s)")
    parser.add_argument("--samples", type=at_least(1), default=4, help="needles at each depth (%(default)s)")
    parser.add_argument("--depths", type=at_least(2), default=5, help="from 0 to 100 %% (%(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the needles (%(default)s)")
    parser.add_argument("--stream", type=at_least(8), help="tokens to stream under SinkRecent instead, such as 100000")
    parser.add_argument("--recent", type=at_least(16), default=1024, help="tokens that a stream keeps (%(default)s)")
    parser.add_argument(
        "--format", choices=list(hf_kvopt.KV_FORMATS), default="native", help="storage format of a stream (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "policies.json", help="JSON file to append rows to")
    parser.add_argument("--plot", type=Path, help="picture of this run (beside --out, with the model's name)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show, write and draw."""
    if args.stream is not None:
        return run_stream(args)
    subject = load_subject(args)
    check_length(subject, args.context)
    sides = [PolicySide(WHOLE, 1.0)]
    sides += [make_side(name, share, args.context) for name in args.policies for share in args.budgets]
    prompts = _prompts(args, subject)
    sums: dict[PolicySide, dict[str, list[Sums]]] = {side: {name: [] for name, *_ in prompts} for side in sides}
    with progress(len(prompts)) as advance:
        for name, ids, prefill, answers in prompts:
            for side, reading in zip(sides, read_segments(subject.model, sides, ids, 16, prefill), strict=True):
                scores = reading.scores.nll if answers is None else reading.scores.is_right.float()
                rows = [row if answers is None else row[-n:] for row, n in zip(scores, answers or scores, strict=True)]
                total, count = sum(float(row.sum()) for row in rows), sum(len(row) for row in rows)
                sums[side][name].append(Sums(total, count, reading.held.used))
            advance(name)
    rows = [_row(side, sums[side], sums[sides[0]]) for side in sides]
    facts = {"eval": "policies", "model": subject.name, "dtype": args.dtype, **text_facts(args)}
    facts |= {"context": args.context, "segments": args.segments, "samples": args.samples, "depths": args.depths}
    append_rows(args.out, [{**facts, **row, **provenance(subject.model.device)} for row in rows])
    _show(subject, rows)
    title = f"{subject.name} in {args.dtype}, texts of {args.context:,} tokens"
    draw(rows, title, args.plot or args.out.with_name(f"policies-{subject.name.replace('/', '-')}.png"))
    return 0


def _prompts(args: argparse.Namespace, subject: Subject) -> list[tuple[str, Tensor, int, list[int] | None]]:
    """Return for each task its name, ids [rows, context], tokens of the prompt, and tokens of each row's answer."""
    segments = make_segments(subject, load_texts(args), args.context, args.segments)
    found: list[tuple[str, Tensor, int, list[int] | None]] = [
        ("perplexity", row[None], args.context * 3 // 4, None) for row in segments
    ]
    depths = [step / (args.depths - 1) for step in range(args.depths)]
    task = "assignment" if args.model is None else "passkey"
    for name, own, texts in (
        ("needle", task, load_texts(args)),
        ("multi_key", "assignment", _with_keys(load_texts(args), args.seed)),
    ):
        for each in make_prompts(subject, texts, own, [args.context], depths, args.samples, args.seed):
            # One row at a time: their answers may be of unlike length.
            found += [
                (name, ids[None], args.context - 1 - n, [n]) for ids, n in zip(each.ids, each.answer_lens, strict=True)
            ]
    return found


def _with_keys(texts: Iterable[str], seed: int) -> Iterable[str]:
    """Plant other keys in texts, such as the one that is asked for."""
    rng = random.Random(f"keys {seed}")
    for text in texts:
        parts = [text[start : start + _EVERY] for start in range(0, len(text), _EVERY)]
        yield "".join(part + TASKS["assignment"](rng)[0] for part in parts)


def _row(side: PolicySide, own: dict[str, list[Sums]], whole: dict[str, list[Sums]]) -> dict[str, Any]:
    def mean(parts: Sequence[Sums]) -> float:
        return sum(part.score for part in parts) / sum(part.num_tokens for part in parts)

    def held(tasks: dict[str, list[Sums]]) -> int:
        return sum(part.held for parts in tasks.values() for part in parts)

    ratio = float(torch.tensor(mean(own["perplexity"]) - mean(whole["perplexity"])).exp())
    row = {
        "policy": side.policy, "budget": side.budget, "held": held(own) / held(whole), "perplexity_ratio": ratio,
        "needle": mean(own["needle"]), "multi_key": mean(own["multi_key"]), "bar": None,
    }  # fmt: skip
    if side.policy in MOST_PERPLEXITY and side.budget == AT_BUDGET:
        most = MOST_PERPLEXITY[side.policy]
        lost = max(mean(whole[name]) - mean(own[name]) for name in ("needle", "multi_key"))
        is_met = lost <= MOST_POINTS and (most is None or ratio <= most)
        row["bar"] = {"most_points": MOST_POINTS, "most_perplexity": most, "lost": lost, "is_met": is_met}
    return row


def _show(subject: Subject, rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        [
            row["policy"], f"{row['budget']:.0%}", f"{row['held']:.1%}", f"{row['perplexity_ratio']:.3f}",
            f"{row['needle']:.1%}", f"{row['multi_key']:.1%}",
            "" if row["bar"] is None else "met" if row["bar"]["is_met"] else "MISSED",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["policy", "budget", "held", "perplexity", "needle", "one of several keys", "bar"]
    show_table(f"what is lost by {subject.name}", columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and give its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
