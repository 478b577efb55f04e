"""`python -m evals.batching`: requests of chat-like lengths by each way to batch, at once and as a Poisson process.

All sides run the same requests in one process, after a round that is not measured, and take turns, so that what else
the machine does meets all of them. Each token is compared with a run of its request alone. A side whose tokens differ,
or that leaves blocks behind, is not written, and the exit status is then 1.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
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

# Of all requests at once, on two CPU cores; the use of the pool where blocks are what requests wait for.
LEAST_OVER_STATIC, LEAST_OVER_STOCK, LEAST_POOL_USE = 2.0, 1.3, 0.9
# Rates of arrival, of what was reached at once.
LOADS = (0.5, 0.8, 1.2)


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("evals.batching", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--requests", type=at_least(1), default=40, help="%(default)s; 200 for the whole comparison")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each side (%(default)s)")
    parser.add_argument("--scale", type=at_least(1), default=8, help="lengths of chats are divided by it (%(default)s)")
    parser.add_argument("--cache", default="paged", help="of our side (%(default)s)")
    parser.add_argument("--max-rows", type=at_least(1), default=64, help="of our side (%(default)s)")
    parser.add_argument("--prefill-chunk", type=at_least(1), default=256, help="tokens of a step (%(default)s)")
    parser.add_argument("--pool", type=at_least(16), default=8192, help="tokens that are held (%(default)s)")
    parser.add_argument("--short-pool", type=at_least(16), default=2048, help="where blocks are short (%(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows of a static batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--without", nargs="*", choices=["static", "generate_batch", "pressure", "load"], default=[])
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
    want, turns = _measure(subject, chats, args)
    rows, is_right = [], True
    for (side, load), outcomes in turns.items():
        is_equal = all(outcome.tokens == want for outcome in outcomes)
        is_clean = all(outcome.is_clean for outcome in outcomes)
        is_right &= is_clean and (is_equal or not side.startswith("ours"))
        if is_clean and is_equal:
            rows.append({**_row(subject, args, side, load, chats, turns), **provenance(subject.model.device)})
    _show(subject, turns, want)
    append_rows(args.out, rows)
    latest = {(row["model"], row["side"], row["load"]): row for row in read_rows(args.out)}
    if latest:
        draw_plot(list(latest.values()), args.plot or args.out.with_suffix(".png"))
    return int(not is_right)


Turns = dict[tuple[str, float | None], list[Outcome]]
"""Outcomes of each side and load, a round each."""
OURS, SHORT = "ours", "ours, short of blocks"


def _measure(subject: Subject, chats: Sequence[Chat], args: argparse.Namespace) -> tuple[list[list[int]], Turns]:
    """Tokens of each request alone, and the outcomes of each side."""
    model: Any = subject.model
    settings = {"cache": args.cache, "max_rows": args.max_rows, "prefill_chunk": args.prefill_chunk}
    at_once = [0.0] * len(chats)
    sides: dict[str, Callable[[Sequence[Chat]], Outcome]] = {
        "static": lambda some: static(model, some, args.batch),
        "ours": lambda some: ours(model, some, at_once[: len(some)], max_tokens=args.pool, **settings),
        "generate_batch": lambda some: stock(model, some, args.pool, args.prefill_chunk),
        "pressure": lambda some: ours(model, some, at_once[: len(some)], max_tokens=args.short_pool, **settings),
    }
    names = {"static": "static batches", "ours": OURS, "generate_batch": "generate_batch", "pressure": SHORT}
    chosen = [side for side in sides if side not in args.without]
    loads = () if "load" in args.without else LOADS
    turns: Turns = {}
    with progress(1 + args.rounds * len(chosen) + len(loads)) as advance:
        want = alone(model, chats)
        for side in chosen:  # the first forwards compile kernels and load things
            sides[side](chats[: max(2, len(chats) // 10)])
        advance("each request alone")
        for number in range(args.rounds):
            # Who goes first changes from round to round.
            for side in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
                turns.setdefault((names[side], None), []).append(sides[side](chats))
                advance(names[side])
        rate = len(chats) / _typical(turns[OURS, None]).seconds
        for load in loads:
            times = arrivals(len(chats), load * rate, args.seed)
            turns[OURS, load] = [ours(model, chats, times, max_tokens=args.pool, **settings)]
            advance(f"ours, at {load:g} of that")
    return want, turns


def _typical(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of median time."""
    return sorted(outcomes, key=lambda outcome: outcome.seconds)[len(outcomes) // 2]


def _row(
    subject: Subject, args: argparse.Namespace, side: str, load: float | None, chats: Sequence[Chat], turns: Turns
) -> dict[str, Any]:
    is_ours, outcome = side.startswith(OURS), _typical(turns[side, load])
    row: dict[str, Any] = {
        "eval": "batching",
        "model": subject.name,
        "dtype": args.dtype,
        "cache": args.cache if is_ours else "native",
        "side": side,
        "load": load,
        "rate_per_s": None if load is None else load * args.requests / _typical(turns[OURS, None]).seconds,
        "requests": args.requests,
        "rounds": len(turns[side, load]),
        "load_average": round(os.getloadavg()[0], 1),  # above 1 to 2, others used the machine as well
        "scale": args.scale,
        "pool_tokens": None if side.startswith("static") else args.short_pool if side == SHORT else args.pool,
        "tokens_per_s": outcome.tokens_per_s,
        "seconds": outcome.seconds,
        "seconds_of_rounds": [one.seconds for one in turns[side, load]],
        "useful_tokens": sum(len(chat.prompt) + chat.num_new - 1 for chat in chats),
        "computed_tokens": outcome.computed_tokens,
        "padded_tokens": outcome.padded_tokens,
        "pool_use": percentile(outcome.pool_use, 0.5) if outcome.pool_use else None,
        "bars": _bars(side, load, turns),
    }
    for name, values in (("first_token", outcome.first_token_s), ("token", outcome.token_s)):
        for share in (50, 95, 99):
            row[f"{name}_p{share}_s"] = percentile(values, share / 100) if values else None
    if outcome.stats is not None:
        row |= {name: getattr(outcome.stats, name) for name in ("preemptions", "cached_tokens", "steps")}
    return row


def _bars(side: str, load: float | None, turns: Turns) -> list[dict[str, Any]]:
    """The bars that our sides, with all requests at once, are held to."""
    if load is not None or not side.startswith(OURS):
        return []
    mine = turns[side, None]
    bars = [("padded tokens", float(max(outcome.padded_tokens or 0 for outcome in mine)), None, 0.0)]
    for name, least in (("static batches", LEAST_OVER_STATIC), ("generate_batch", LEAST_OVER_STOCK)):
        if side == OURS and (name, None) in turns:
            # Round by round: what slows the machine down slows both.
            ratios = [theirs.seconds / own.seconds for own, theirs in zip(mine, turns[name, None], strict=True)]
            bars.append((f"tokens/s over {name}", percentile(ratios, 0.5), least, None))  # type: ignore[arg-type]
    use = [share for outcome in mine for share in outcome.pool_use]
    if side == SHORT and use:
        bars.append(("pool use", percentile(use, 0.5), LEAST_POOL_USE, None))  # type: ignore[arg-type]
    return [
        {"of": name, "is": value, "least": least, "most": most,
         "is_met": (least is None or value >= least) and (most is None or value <= most)}
        for name, value, least, most in bars
    ]  # fmt: skip


def _show(subject: Subject, turns: Turns, want: list[list[int]]) -> None:
    columns = ("side", "load", "tokens/s", "computed", "padded", "TTFT p50/p95/p99 s", "token p50 ms", "preempted",
               "pool use", "equal")  # fmt: skip
    lines = []
    for (side, load), outcomes in turns.items():
        one = _typical(outcomes)
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
    for side in (OURS, SHORT):
        for bar in _bars(side, None, turns) if (side, None) in turns else ():
            bound = f">= {bar['least']:g}" if bar["least"] is not None else f"<= {bar['most']:g}"
            print(f"{side}: {bar['of']} {bar['is']:.2f} ({bound}: {'met' if bar['is_met'] else 'MISSED'})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval; returns the exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
