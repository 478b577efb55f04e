"""Figures of docs/results.md, written from the rows: `python -m evals.report --collect --figures`.

The text between `<!-- figures: NAME -->` and `<!-- end -->` is generated here only; a test compares the page with the
rows, so that it cannot state what was not measured.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from evals._common.cli import BadArgumentError
from evals.report.rows import Fields, Found, newest
from evals.report.trade import latest_losses, share

_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CACHES = {
    "dynamic+sdpa": "DynamicCache",
    "static+sdpa": "StaticCache",
    "transformers_fp8+sdpa": "transformers' fp8",
    "paged+hf_kvopt": "**paged**",
    "int8+hf_kvopt": "**int8**",
    "int4+hf_kvopt": "**int4**",
    "int4/int4+hf_kvopt": "**int4/int4**",
}
_METRICS = {"step_ms": "decode step", "prefill_ms": "prefill"}
_DRAFTS = {
    "plain, DynamicCache": "plain, DynamicCache",
    "plain, PagedCache": "plain, PagedCache",
    "eagle3": "EAGLE-3 head",
    "medusa": "Medusa heads",
    "prompt lookup": "prompt lookup",
    "lookahead": "lookahead",
    "transformers' prompt lookup": "transformers' prompt lookup",
}


def fill(page: str, rows: Iterable[Found]) -> str:
    """Return the text of a page with every block of figures regenerated.

    Raises:
        BadArgumentError: a block is unknown, or the rows that a block needs are missing.
    """
    full = [row for row in rows if not row.is_quick]

    def block(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in BLOCKS:
            raise BadArgumentError(f"block of figures must be one of {', '.join(BLOCKS)}: got {name!r}")
        try:
            return f"{start}{BLOCKS[name](full)}\n{end}"
        except (KeyError, IndexError) as error:
            raise BadArgumentError(
                f"rows for the figures of {name!r} are missing: {error}; run python -m evals.report"
            ) from error

    return _BLOCK.sub(block, page)


def _speed(rows: Sequence[Found]) -> str:
    mine = _fields(rows, "speed", "side", "context", "batch", model="random-bench", batch=1)
    by_place = {(f["side"], f["context"]): f for f in mine}

    shown = {side: name for side, name in _CACHES.items() if "int4" not in side or (side, 8192) in by_place}

    def line(what: str, context: int, show: Callable[[Fields], str]) -> list[str]:
        cells = [show(by_place[side, context]) for side in shown]
        return [what, *(f"**{c}**" if "**" in name else c for c, name in zip(cells, shown.values(), strict=True))]

    lines = [
        line("decode step at 8,192 tokens, ms", 8192, lambda f: f"{f['step_ms']:.1f}"),
        line("KV memory at 8,192 tokens, MiB (free blocks included)", 8192, _kv_mebibytes),
        line("prefill of 8,192 tokens, s", 8192, lambda f: f"{f['prefill_ms'] / 1e3:.2f}"),
        line("decode step at 128 tokens, ms", 128, lambda f: f"{f['step_ms']:.1f}"),
        line("prefill of 128 tokens, ms", 128, lambda f: f"{f['prefill_ms']:.1f}"),
    ]
    bars = _fields(rows, "speed-bar", "metric", "context", "side", "baseline", model="random-bench")
    goals = [
        (
            f"{_METRICS[f['metric']]} at {f['context']:,} tokens: {_plain(f['side'])} over {_plain(f['baseline'])}",
            f"{f['limit']:.2f}x",
            f"{f['ratio']:.3f}x",
            _verdict(f["is_met"]),
        )
        for f in sorted(bars, key=lambda f: (-f["context"], f["side"], f["metric"]))
    ]
    return _table(["", *shown.values()], lines) + "\n\n" + _table(["time of", "at most", "measured", ""], goals)


def _loss(rows: Sequence[Found]) -> str:
    def of(model: str) -> dict[str, Fields]:
        where = {"model": model, "chunk": 16, "context": 1025}
        whole = [row for row in rows if not row.fields.get("prefill")]  # the others score only what follows a prompt
        return {f["side"].split("+")[0]: f for f in _fields(whole, "perplexity", "side", **where)}

    ordinary, biased, lines = of("reference_model"), of("reference_model with outliers"), []
    for cache in ("int8", "fp8_e4m3", "k8v4", "int4", "transformers_fp8"):
        f, other = ordinary[cache], biased[cache]
        loss = f"{_percent(f['delta'])} [{_percent(f['delta_low'])}, {_percent(f['delta_high'])}]"
        name = "transformers' fp8" if cache == "transformers_fp8" else cache
        bars = (_bar(one, "delta") for one in (f, other))
        goal, harder = (f"{_percent(bar['limit'])}, {_verdict(bar['met'])}" if bar else "" for bar in bars)
        behind = f" (goal {harder})" if harder else ""
        lines.append([name, f"{share(f):.2f}", loss, goal, _percent(other["delta"]) + behind])
    columns = [
        "cache",
        "bytes, of bfloat16",
        "loss of perplexity, 95 % interval",
        "goal, at most",
        "with Qwen-like key biases",
    ]
    return _table(columns, lines)


def _real(rows: Sequence[Found]) -> str:
    """Losses on models that this project did not train, a table for each model and text, smallest cache last."""
    panels = {name: found for name, found in latest_losses(rows).items() if not name.startswith("reference_model")}
    if not panels:
        raise KeyError("perplexity of a real model")
    parts = []
    for name, found in panels.items():
        first, lines = found[0], []
        for f in sorted(found, key=share, reverse=True):
            loss = f"{_percent(f['delta'])} [{_percent(f['delta_low'])}, {_percent(f['delta_high'])}]"
            bars = [f"{_NAMES[b['metric']]} {_limit(b)}, {_verdict(b['met'])}" for b in f["bars"]]
            cache = f["side"].split("+")[0].replace("transformers_", "transformers' ")
            size, top1 = f"{share(f):.2f}", f"{f['top1_agreement']:.1%}"
            lines.append([cache, size, loss, f"{f['kl_mean']:.1e}", top1, "; ".join(bars)])
        said = (
            f"**{name}**, {first['num_segments']} segments of {first['context']:,} tokens in chunks of "
            f"{first['chunk']}, {first['dtype']}:"
        )
        columns = ["cache", "bytes, of bfloat16", "loss of perplexity, 95 % interval", "KL", "top-1", "goals, at most"]
        parts += [said, _table(columns, lines)]
    return "\n\n".join(parts)


_NAMES = {"delta": "loss", "kl_mean": "KL", "top1_lost": "other first choices", "bf16_share": "bytes at 32k"}


def _limit(bar: Fields) -> str:
    return f"{bar['limit']:.1e}" if bar["metric"] == "kl_mean" else _percent(bar["limit"]).lstrip("+")


def _prefix(rows: Sequence[Found]) -> str:
    first = {(f["length"], f["batch"], f["hit"]): f for f in _fields(rows, "prefix", "length", "batch", "hit")}
    known, cold, batch = first[4096, 1, 0.95], first[4096, 1, 0.0], first[1024, 4, 0.95]
    pools = {f["strategy"]: f for f in _fields(rows, "fragmentation", "strategy", requests=1000)}
    plain, shared, pieces = (
        pools[name] for name in ("paged 16", "paged 16, and shared prefixes", "contiguous, longest")
    )
    sooner, (goal, met) = 1 / known["shared_over_plain"], _goal(known)
    cold_goal, cold_met = _goal(cold)
    waste_goal, waste_met = _goal(plain)
    held, copied = (batch[side] / 2**20 for side in ("shared_kv_bytes", "plain_kv_bytes"))
    said = [
        f"The first token of a 4,096-token prompt comes **{sooner:.1f}x** sooner where 95 % are known (goal "
        f"{1 / goal:.0f}x, {met}), and at {cold['shared_over_plain']:.2f}x of the time where nothing is (goal at most "
        f"{cold_goal:.2f}x, {cold_met}).",
        f"Four such prompts of 1,024 tokens in a batch keep {held:.1f} MiB instead of {copied:.1f}.",
        f"Over {plain['requests']:,} chat completions in a fixed pool, blocks of 16 waste {100 * plain['waste']:.1f} % "
        f"(goal below {100 * waste_goal:.0f} %, {waste_met}) and hold {plain['concurrency']:.0f} sequences at once, "
        f"{shared['concurrency']:.0f} with shared prefixes; one contiguous piece a sequence holds "
        f"{pieces['concurrency']:.0f}.",
    ]
    return "\n".join(_wrap(line, "- ", "  ") for line in said)


def _goal(fields: Fields) -> tuple[float, str]:
    return fields["bar"]["most"], _verdict(fields["bar"]["is_met"])


def _speculation(rows: Sequence[Found]) -> str:
    where = {"model": "reference_model", "temperature": 0.0}
    found = {(f["side"], f["batch"]): f for f in _fields(rows, "acceptance", "side", "batch", **where)}

    def cell(f: Fields, metric: str, form: str) -> str:
        value, bar = f.get(metric), _bar(f, metric)
        goal = f" (goal {form.format(bar['least'])}, {_verdict(bar['met'])})" if bar else ""
        return "" if value is None else form.format(value) + goal

    lines = []
    others = {side: side for side, batch in found if batch == 1 and side not in _DRAFTS}
    for side, name in (_DRAFTS | others).items():
        one, eight = found[side, 1], found.get((side, 8))
        lines.append(
            [
                name,
                cell(one, "mean_accepted_length", "{:.2f}"),
                f"{one['tokens_per_s']:.0f}",
                cell(one, "speedup_dynamic", "{:.2f}x"),
                cell(eight, "speedup_dynamic", "{:.2f}x") if eight else "batch 1 only",
            ]
        )
    return _table(["", "tokens a verification", "tokens/s, batch 1", "over DynamicCache", "batch 8"], lines)


def _why(rows: Sequence[Found]) -> str:
    (f,) = _fields(rows, "why", "what", what="decoding", model="reference_model", new_tokens=100)[-1:]
    return _wrap(
        f"Without any cache {f['new_tokens']} tokens take {f['naive_queries']:,} queries a layer instead of "
        f"{f['cached_queries']:,}, and {f['speed_up']:.1f}x the time on the bundled model (`python -m evals.why`, "
        "`examples/why_cache.py`)."
    )


BLOCKS: dict[str, Callable[[Sequence[Found]], str]] = {
    "speed": _speed,
    "loss": _loss,
    "real": _real,
    "prefix": _prefix,
    "speculation": _speculation,
    "why": _why,
}


def _fields(rows: Sequence[Found], eval: str, *names: str, **where: Any) -> list[Fields]:
    """Return the newest rows of an eval with these values, one for each combination of `names`."""
    own = [r for r in rows if r.eval == eval and all(r.fields.get(name) == value for name, value in where.items())]
    return [row.fields for row in newest(own, *names)]


def _bar(fields: Fields, metric: str) -> Fields | None:
    return next((bar for bar in fields.get("bars") or [] if bar["metric"] == metric), None)


def _kv_mebibytes(fields: Fields) -> str:
    return f"{fields['kv_reserved_bytes'] / 2**20:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %".replace("-", "−")


def _plain(side: str) -> str:
    return _CACHES[side].strip("*")


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def _wrap(text: str, first: str = "", other: str = "") -> str:
    # Break only at spaces: names of options hold hyphens.
    return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=other, break_on_hyphens=False)


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, figures are right-aligned."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *lines)).replace("|  |", "| |")
