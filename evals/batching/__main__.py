"""`python -m evals.batching`: requests of chat-like lengths by each way to batch, at once and as a Poisson process.

All sides run the same requests in one process, each token is compared with a run of its request alone. A side whose
tokens differ, or that leaves blocks behind, is not written, and the exit status is then 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.models import Subject, add_model_arguments, load_subject
from evals._common.prompts import add_text_arguments, load_texts, token_stream
from evals._common.rows import append_rows, provenance, read_rows
from evals._common.screen import progress, show_table
from evals.batching.plot import draw as draw_plot
from evals.batching.sides import Outcome, alone, ours, static, stock
from evals.batching.workload import Chat, arrivals, draw, percentile
from evals.fragmentation.workload import MAX_PROMPT

# Of all requests at once, on two CPU cores.
LEAST_OVER_STATIC, LEAST_OVER_STOCK, LEAST_POOL_USE = 2.0, 1.3, 0.9
# Rates of arrival, of what was reached at once.
LOADS = (0.5, 0.8, 1.2)


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("evals.batching", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--requests", type=at_least(1), default=200, help="%(default)s")
    parser.add_argument("--scale", type=at_least(1), default=8, help="lengths of chats are divided by it (%(default)s)")
    parser.add_argument("--cache", default="paged", help="of our side (%(default)s)")
    parser.add_argument("--max-rows", type=at_least(1), default=32, help="of our side (%(default)s)")
    parser.add_argument("--prefill-chunk", type=at_least(1), default=256, help="of our side (%(default)s)")
    parser.add_argument("--pool", type=at_least(16), default=4096, help="tokens that our side holds (%(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows of a static batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--without", nargs="*", choices=["static", "generate_batch", "load"], default=[])
    add_output_argument(parser, "batching.json")
    parser.add_argument("--plot", type=Path, help="picture of the latest rows of that file (beside it, .png)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show, write and draw; 1 where tokens differ or a block is left behind."""
    subject = load_subject(args)
    subject.model.generation_config.eos_token_id = None
    subject.model.generation_config.pad_token_id = 0
    stream = token_stream(subject, load_texts(args), 64 * MAX_PROMPT // args.scale)
    chats = draw(args.requests, stream, args.scale, args.seed)
    want, outcomes = _measure(subject, chats, args)
    rows, is_right = [], True
    for (side, rate), outcome in outcomes.items():
        is_equal = outcome.tokens == want
        is_right &= outcome.is_clean and (is_equal or not side.startswith("ours"))
        if outcome.is_clean and is_equal:
            rows.append({**_row(subject, args, side, rate, outcome, outcomes), **provenance(subject.model.device)})
    _show(subject, outcomes, want)
    append_rows(args.out, rows)
    latest = {(row["model"], row["side"], row["load"]): row for row in read_rows(args.out)}
    if latest:
        draw_plot(list(latest.values()), args.plot or args.out.with_suffix(".png"))
    return int(not is_right)


Outcomes = dict[tuple[str, float | None], Outcome]


def _measure(subject: Subject, chats: Sequence[Chat], args: argparse.Namespace) -> tuple[list[list[int]], Outcomes]:
    """Tokens of each request alone, and the outcome of each side, by its name and load."""
    model, outcomes = subject.model, {}  # type: Any, Outcomes
    settings = {
        "cache": args.cache,
        "max_rows": args.max_rows,
        "prefill_chunk": args.prefill_chunk,
        "max_tokens": args.pool,
    }
    with progress(7) as advance:
        want = alone(model, chats)
        # The first forwards compile kernels and load things.
        static(model, chats[:2], 2)
        ours(model, chats[:2], [0.0, 0.0], **settings)
        advance("each request alone")
        if "static" not in args.without:
            outcomes["static batches", None] = static(model, chats, args.batch)
        advance("static padded batches")
        outcomes["ours", None] = at_once = ours(model, chats, [0.0] * len(chats), **settings)
        advance("ours, all at once")
        if "generate_batch" not in args.without:
            outcomes["generate_batch", None] = stock(model, chats)
        advance("transformers' generate_batch")
        for load in () if "load" in args.without else LOADS:
            times = arrivals(len(chats), load * len(chats) / at_once.seconds, args.seed)
            outcomes["ours", load] = ours(model, chats, times, **settings)
            advance(f"ours, at {load:g} of that")
    return want, outcomes


def _row(
    subject: Subject, args: argparse.Namespace, side: str, load: float | None, outcome: Outcome, outcomes: Outcomes
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "eval": "batching",
        "model": subject.name,
        "dtype": args.dtype,
        "cache": args.cache if side == "ours" else "native",
        "side": side,
        "load": load,
        "rate_per_s": None if load is None else load * args.requests / outcomes["ours", None].seconds,
        "requests": args.requests,
        "scale": args.scale,
        "pool_tokens": args.pool if side == "ours" else None,
        "tokens_per_s": outcome.tokens_per_s,
        "seconds": outcome.seconds,
        "computed_tokens": outcome.computed_tokens,
        "padded_tokens": outcome.padded_tokens,
        "pool_use": percentile(outcome.pool_use, 0.5) if outcome.pool_use else None,
        "bars": _bars(side, load, outcomes),
    }
    for name, values in (("first_token", outcome.first_token_s), ("token", outcome.token_s)):
        for share in (50, 95, 99):
            row[f"{name}_p{share}_s"] = percentile(values, share / 100) if values else None
    if outcome.stats is not None:
        row |= {name: getattr(outcome.stats, name) for name in ("preemptions", "cached_tokens", "steps")}
    return row


def _bars(side: str, load: float | None, outcomes: Outcomes) -> list[dict[str, Any]]:
    """The bars that our side, with all requests at once, is held to."""
    if (side, load) != ("ours", None):
        return []
    outcome = outcomes["ours", None]
    bars = [("padded tokens", float(outcome.padded_tokens or 0), None, 0.0)]
    for name, least in (("static batches", LEAST_OVER_STATIC), ("generate_batch", LEAST_OVER_STOCK)):
        other = outcomes.get((name, None))
        if other is not None:
            bars.append((f"tokens/s over {name}", outcome.tokens_per_s / other.tokens_per_s, least, None))  # type: ignore[arg-type]
    if outcome.pool_use:
        bars.append(("pool use", percentile(outcome.pool_use, 0.5), LEAST_POOL_USE, None))  # type: ignore[arg-type]
    return [
        {"of": name, "is": value, "least": least, "most": most,
         "is_met": (least is None or value >= least) and (most is None or value <= most)}
        for name, value, least, most in bars
    ]  # fmt: skip


def _show(subject: Subject, outcomes: Outcomes, want: list[list[int]]) -> None:
    columns = ("side", "load", "tokens/s", "computed", "padded", "TTFT p50/p95/p99 s", "token p50 ms", "preempted",
               "pool use", "equal")  # fmt: skip
    lines = []
    for (side, load), one in outcomes.items():
        first = "/".join(f"{percentile(one.first_token_s, share):.2f}" for share in (0.5, 0.95, 0.99))
        equal = sum(got == wanted for got, wanted in zip(one.tokens, want, strict=True))
        lines.append(
            (
                side,
                "at once" if load is None else f"{load:g}",
                f"{one.tokens_per_s:.1f}",
                one.computed_tokens if one.computed_tokens is not None else "",
                one.padded_tokens if one.padded_tokens is not None else "",
                first if one.first_token_s else "",
                f"{1e3 * percentile(one.token_s, 0.5):.0f}" if one.token_s else "",
                one.stats.preemptions if one.stats is not None else "",
                f"{percentile(one.pool_use, 0.5):.0%}" if one.pool_use else "",
                f"{equal}/{len(want)}",
            )
        )
    show_table(f"requests of chat-like lengths, {subject.name}", columns, lines)
    for bar in _bars("ours", None, outcomes):
        bound = f">= {bar['least']:g}" if bar["least"] is not None else f"<= {bar['most']:g}"
        print(f"{bar['of']}: {bar['is']:.2f} ({bound}: {'met' if bar['is_met'] else 'MISSED'})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval; returns the exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
