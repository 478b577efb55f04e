"""`python -m evals.perplexity`: what caches lose, read through in chunks and never in one forward.

Reports perplexity, its change against an unquantized cache with a paired bootstrap interval, KL divergence of the
next-token distribution (mean with interval, 99th and 99.9th percentile), top-1 agreement and KV bytes per token, of all
formats of the library and of transformers' quantized caches. `--outliers` gives the model key biases like Qwen2.5's.
Bars of the bundled model, smollm2 and Qwen2.5-Coder are printed with their verdict; `--check` turns a missed one into
exit status 1. Under `accelerate launch -m evals.perplexity` every process reads its share of the segments.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from evals._common.cli import BadArgumentError, Parser, add_output_argument, at_least
from evals._common.memory import KVBytes
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.outliers import add_outliers
from evals._common.prompts import add_text_arguments, corpus_of, load_texts, text_facts, text_name
from evals._common.reading import Reading, join_scores, read_segments
from evals._common.rows import append_rows, provenance
from evals._common.screen import progress, show_table
from evals._common.shards import Shard, join_shards
from evals._common.sides import FORMATS, Side, accepted_sides, add_sides_argument, lossy_sides, parse_side
from evals.perplexity.bars import Verdict, bars_for, judge
from evals.perplexity.plot import Point, plot_trade
from evals.perplexity.segments import make_segments
from evals.perplexity.summary import Summary, summarize
from hf_kvopt import plan

_JUDGED_TOKENS = 32 * 1024  # at which memory is judged: a context where quantizing is worth while


class Result(NamedTuple):
    """One side at one chunk size."""

    side: Side
    chunk: int
    summary: Summary
    held: KVBytes  # of all segments together
    bf16_bytes: float  # that the baseline's states take in bfloat16
    num_cached: int  # tokens held: all but the last of each segment

    @property
    def bf16_share(self) -> float:
        """Bytes that the cache used at the end of the segments, of those that bfloat16 takes."""
        return self.held.used / self.bf16_bytes

    def figures(self, subject: Subject) -> dict[str, tuple[float, float | None, float | None]]:
        """Give what bars are about, as value, low and high end of the interval."""
        s = self.summary
        return {
            "delta": (s.delta, s.delta_low, s.delta_high),
            "kl_mean": (s.kl_mean, s.kl_low, s.kl_high),
            "top1_lost": (1 - s.top1_agreement, None, None),
            **_long_share(subject, self.side),
        }


def _long_share(subject: Subject, side: Side) -> dict[str, tuple[float, float | None, float | None]]:
    """Give a format's share of bfloat16's bytes at 32k tokens by arithmetic; nothing for caches of others."""
    if side.cache not in FORMATS:
        return {}
    question: dict[str, Any] = {"context": _JUDGED_TOKENS, "dtype": "bfloat16", "weights": False}
    native, own = (
        plan.memory(subject.model.config, format=name, **question).used_bytes for name in ("native", side.cache)
    )
    return {"bf16_share": (own / native, None, None)}


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("evals.perplexity", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser, part="verdict")
    add_sides_argument(parser, *lossy_sides())
    parser.add_argument("--baseline", default="dynamic+sdpa", help="cache+attention (%(default)s)")
    parser.add_argument("--chunks", nargs="+", type=at_least(1), default=[16], help="tokens fed at once (16)")
    parser.add_argument(
        "--prefill", type=at_least(0), default=0, help="feed so many tokens at once first, and score what follows (0)"
    )
    parser.add_argument("--context", type=at_least(2), default=1025, help="tokens of a segment (%(default)s)")
    parser.add_argument("--segments", type=at_least(1), help="how many, evenly spread (all)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="segments read at once (%(default)s)")
    parser.add_argument("--outliers", action="store_true", help="add large key biases to the model")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--plot", type=Path, help="picture to write (beside --out)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the bootstrap (%(default)s)")
    add_output_argument(parser, "perplexity.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write; with --check 1 where a bar is missed."""
    sides = list(dict.fromkeys(parse_side(text) for text in [args.baseline, *args.sides]))
    bars = bars_for(args)
    if args.check and not any(bar.cache == side.cache for bar in bars for side in sides):
        raise BadArgumentError("--check has no bar for these sides")
    shard = join_shards(args)
    subject = _subject(args)
    sides = accepted_sides(subject.model, sides)
    segments = make_segments(subject, load_texts(args), args.context, args.segments)
    check_length(subject, args.context)
    if args.prefill > args.context - 2:
        raise BadArgumentError(
            f"--prefill must leave a token to read and one to predict: got {args.prefill} of {args.context} tokens"
        )
    results = [result for chunk in args.chunks for result in _measure(args, subject, sides, segments, chunk, shard)]
    if not shard.is_main:
        return 0
    verdicts = [v for r in results for v in judge(bars, r.side, r.chunk, r.figures(subject))]
    _show(args, subject, results)
    _show_bars(verdicts)
    facts = {"processes": shard.num_processes, **provenance(subject.model.device)}
    append_rows(args.out, [{**_row(args, subject, result, verdicts), **facts} for result in results])
    _plot(args, subject, results)
    return int(args.check and not all(verdict.is_met for verdict in verdicts))


def _subject(args: argparse.Namespace) -> Subject:
    subject = load_subject(args)
    if not args.outliers:
        return subject
    return subject._replace(name=f"{subject.name} with outliers", model=add_outliers(subject.model))


def _measure(
    args: argparse.Namespace, subject: Subject, sides: Sequence[Side], segments: Tensor, chunk: int, shard: Shard
) -> Iterator[Result]:
    batches = shard.of(segments.split(args.batch))
    own: list[list[Reading]] = []
    with progress(len(batches)) if shard.is_main else nullcontext(lambda doing: None) as advance:
        for batch in batches:
            own.append(read_segments(subject.model, sides, batch, chunk, args.prefill))
            advance(f"chunk {chunk}")
    readings = shard.gather(own)
    scores = [join_scores([batch[i].scores for batch in readings]) for i in range(len(sides))]
    sizes = [_total([batch[i].held for batch in readings]) for i in range(len(sides))]
    bf16_bytes = sizes[0].used * 2 / subject.model.dtype.itemsize
    for side, score, size in zip(sides, scores, sizes, strict=True):
        summary = summarize(scores[0], score, args.seed)
        yield Result(side, chunk, summary, size, bf16_bytes, summary.num_segments * (args.context - 1))


def _total(sizes: Sequence[KVBytes]) -> KVBytes:
    return KVBytes(sum(size.used for size in sizes), sum(size.reserved for size in sizes))


def _row(args: argparse.Namespace, subject: Subject, result: Result, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    own = [v for v in verdicts if (v.side, v.chunk) == (result.side, result.chunk)]
    return {
        "eval": "perplexity",
        "model": subject.name,
        "side": str(result.side),
        "baseline": args.baseline,
        "dtype": args.dtype,
        **text_facts(args),
        "outliers": args.outliers,
        "chunk": result.chunk,
        "prefill": args.prefill,
        "context": args.context,
        "batch": args.batch,
        "seed": args.seed,
        **result.summary._asdict(),
        "kv_bytes_per_token": result.held.used / result.num_cached,
        "kv_reserved_bytes_per_token": result.held.reserved / result.num_cached,
        "bf16_share": result.bf16_share,
        "bf16_share_32k": _long_share(subject, result.side).get("bf16_share", (None,))[0],
        "bars": [{"metric": v.bar.metric, "limit": v.bar.limit, "value": v.value, "met": v.is_met} for v in own],
    }


def _show(args: argparse.Namespace, subject: Subject, results: Sequence[Result]) -> None:
    columns = ["side", "chunk", "PPL", "ΔPPL", "95 % interval", "KL", "95 % interval", "p99", "p99.9", "top-1"]
    columns += ["KV B/token", "of bf16"]
    lines = []
    for result in results:
        s = result.summary
        lines.append(
            [
                result.side,
                result.chunk,
                f"{s.perplexity:.4f}",
                f"{s.delta:+.3%}",
                f"{s.delta_low:+.3%} {s.delta_high:+.3%}",
                f"{s.kl_mean:.2e}",
                f"{s.kl_low:.1e} {s.kl_high:.1e}",
                f"{s.kl_p99:.1e}",
                f"{s.kl_p999:.1e}",
                f"{s.top1_agreement:.2%}",
                f"{result.held.used / result.num_cached:.0f}",
                f"{result.bf16_share:.3f}",
            ]
        )
    first = results[0].summary
    where = text_name(args) or f"{corpus_of(args)}, {args.part}"
    behind = f", scored behind {args.prefill} read at once" if args.prefill else ""
    title = (
        f"{subject.name} in {args.dtype} on {where}: {first.num_segments} segments of {args.context} tokens{behind}, "
        f"against {args.baseline}"
    )
    show_table(title, columns, lines)


def _show_bars(verdicts: Sequence[Verdict]) -> None:
    if verdicts:
        lines = [[v.side, v.chunk, v.bar.metric, *_shown(v), v.word] for v in verdicts]
        show_table("bars", ["side", "chunk", "figure", "at most", "measured", "95 % interval", "verdict"], lines)


def _shown(verdict: Verdict) -> list[str]:
    """Write limit, value and interval of a verdict in the unit of its metric."""
    form = "{:.2e}" if verdict.bar.metric == "kl_mean" else "{:+.3%}" if verdict.bar.metric == "delta" else "{:.1%}"
    ends = [verdict.low, verdict.high]
    interval = " ".join(form.format(end) for end in ends if end is not None)
    return [form.format(verdict.bar.limit), form.format(verdict.value), interval]


def _plot(args: argparse.Namespace, subject: Subject, results: Sequence[Result]) -> None:
    points = [
        Point(str(r.side), r.chunk, r.held.used / r.num_cached, s.delta, s.delta_low, s.delta_high, s.kl_mean)
        for r in results
        for s in [r.summary]
    ]
    path = args.plot or args.out.with_suffix(".png")
    behind = f", behind {args.prefill} read at once" if args.prefill else ""
    plot_trade(path, f"{subject.name}, {args.dtype}, segments of {args.context} tokens{behind}", points)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and give its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
