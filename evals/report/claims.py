"""Claims of the report: goal, measurement, place and date; one reader for each eval's rows."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from evals.report.rows import Found, newest


class Claim(NamedTuple):
    """One line of the report; `is_met` is None for a figure without a goal."""

    eval: str
    claim: str
    goal: str
    measured: str
    is_met: bool | None
    where: str
    when: str
    revision: str
    is_quick: bool


Reader = Callable[[Sequence[Found]], list[Claim]]


# Counted, not timed or estimated: as true in a short run as in a long one. Other figures of quick runs get no verdict.
_EXACT = ("equality", "memory", "why")


def claims_of(rows: Iterable[Found]) -> list[Claim]:
    """Return the claims that the rows support, eval by eval in the order of the page, those with a goal first."""
    by_eval: dict[str, list[Found]] = defaultdict(list)
    for row in rows:
        by_eval[row.eval].append(row)
    claims: list[Claim] = []
    for name in [*READERS, *sorted(set(by_eval) - set(READERS))]:
        if by_eval.get(name):
            claims += _read(name, by_eval[name])
    return claims


def _read(name: str, rows: Sequence[Found]) -> list[Claim]:
    try:
        claims = READERS.get(name, _bars)(rows)
        judged = [c._replace(is_met=None) if c.is_quick and c.eval not in _EXACT else c for c in claims]
        return sorted(judged, key=lambda claim: claim.goal == "-")
    except KeyError as error:
        # Rows of another version: reported on the page, beside the others.
        return [_claim(rows[-1], f"rows of {name} cannot be read", "-", f"no field {error}", None)]


def _claim(row: Found, claim: str, goal: str, measured: str, is_met: bool | None, eval: str | None = None) -> Claim:
    revision = str(row.fields.get("revision") or "")
    when = row.date[:16].replace("T", " ")
    return Claim(eval or row.eval, claim, goal, measured, is_met, row.where, when, revision, row.is_quick)


def _equality(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for side in sorted({str(row.fields["side"]) for row in rows}):
        own = newest([r for r in rows if r.fields["side"] == side], "model", "scenario", "dtype")
        exact = [row for row in own if row.fields.get("dtype") == "float32"]
        if exact:
            num_equal = sum(row.fields["num_equal"] for row in exact)
            num_tokens = sum(row.fields["num_tokens"] for row in exact)
            is_met = all(row.fields["is_equal"] for row in exact)
            said = f"{num_equal:,} of {num_tokens:,} tokens in {len(exact)} scenarios"
            claims.append(
                _claim(exact[-1], f"{side} writes transformers' tokens", "every token in float32", said, is_met)
            )
    return claims


def _speed(rows: Sequence[Found]) -> list[Claim]:
    """Return figures without a goal: steps of our side, beside the baseline of the same run."""
    claims = []
    for row in newest(rows, "model", "side", "context", "batch", "dtype", "device"):
        f = row.fields
        if f["side"] != f["baseline"]:
            what = f"{f['side']}, {f['model']}, {f['context']:,} tokens, batch {f['batch']}"
            said = f"step {f['step_ms']:.2f} ms, {f['step_ratio']:.2f}x of {f['baseline']}"
            claims.append(_claim(row, what, "-", said, None))
    return claims


def _speed_bars(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "model", "metric", "context", "side", "baseline", "device"):
        f = row.fields
        what = f"{f['metric'].removesuffix('_ms')} of {f['side']} at {f['context']:,} tokens over {f['baseline']}"
        claims.append(_claim(row, what, f"at most {f['limit']:g}x", f"{f['ratio']:.3f}x", f["is_met"], "speed"))
    return claims


# What tells one reading of a text from another.
_READ_AS = ("model", "side", "chunk", "context", "outliers", "dataset", "corpus", "part", "dtype", "prefill")


def _perplexity(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    # Rows from before --prefill lack the field.
    rows = [row._replace(fields={"prefill": 0, **row.fields}) for row in rows]
    for row in newest(rows, *_READ_AS):
        f = row.fields
        what = f"{f['side']}, {f['model']}, segments of {f['context']} tokens in chunks of {f['chunk']}"
        what += f" behind {f['prefill']} at once" if f.get("prefill") else ""
        what += f" of {f['corpus']}" if f.get("corpus") else ""
        bars = f.get("bars") or []
        claims += [_claim(row, f"{what}: {_NAMES.get(b['metric'], b['metric'])}", *_bar(b)) for b in bars]
        if not bars and f.get("side") != f.get("baseline") and isinstance(f.get("delta"), float):
            claims.append(_claim(row, f"{what}: loss of perplexity", "-", f"{f['delta']:+.3%}", None))
    return claims


_NAMES = {
    "delta": "loss of perplexity",
    "kl_mean": "KL divergence",
    "top1_lost": "share of other first choices",
    "bf16_share": "KV bytes over bfloat16's",
    "mean_accepted_length": "tokens a verification",
    "speedup_dynamic": "speed over DynamicCache's",
}


def _bar(bar: dict[str, Any]) -> tuple[str, str, bool | None]:
    """Return (goal, measured, met) of a bar as the evals write it."""
    value, limit = bar.get("value"), bar.get("limit", bar.get("most", bar.get("least")))
    is_share = bar.get("metric") == "delta"
    show = (lambda x: f"{x:+.3%}") if is_share else (lambda x: f"{x:.3g}")
    sign = "at least" if "least" in bar else "at most"
    met = bar.get("met", bar.get("is_met"))
    return (
        f"{sign} {show(limit)}" if isinstance(limit, int | float) else str(limit),
        show(value) if isinstance(value, int | float) else str(value),
        met if isinstance(met, bool) else None,
    )


def _needle(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "model", "side", "task", "outliers", "dtype"):
        f = row.fields
        what = f"{f['side']}, {f['model']}: needles found"
        claims.append(_claim(row, what, "-", f"{f['exact']:.1%} exactly, {f['token_accuracy']:.1%} of tokens", None))
    return claims


def _prefix(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "model", "length", "batch", "hit", "device"):
        f, bar = row.fields, row.fields.get("bar") or {}
        what = f"first token, {f['length']:,} tokens, batch {f['batch']}, {f['hit']:.0%} known: shared over plain"
        goal = f"at most {bar['most']:.3g}x" if bar else "-"
        said = f"{f['shared_over_plain']:.3f}x ({f['plain_ms']:.0f} -> {f['shared_ms']:.0f} ms)"
        claims.append(_claim(row, what, goal, said, bar.get("is_met")))
    return claims


def _fragmentation(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "strategy", "requests", "pool_tokens"):
        f, bar = row.fields, row.fields.get("bar") or {}
        goal = f"below {bar['most']:.0%}" if bar else "-"
        said = f"{f['waste']:.1%} wasted, {f['concurrency']:.0f} rows at once"
        claims.append(_claim(row, f"{f['strategy']}, {f['requests']:,} requests", goal, said, bar.get("is_met")))
    return claims


def _memory(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "what", "model", "context", "said", "kind", "format"):
        f = row.fields
        if f["what"] == "textbook":
            length = f", {f['context']:,} tokens" if f["context"] > 1 else ""
            goal = "-" if f["note"] else f"{f['said']:g} {f['unit']}"
            off = f"; a source's {f['said']:g} {f['unit']} {f['note']}" if f["note"] else ""
            said, is_met = f"{_number(f['computed'])} {f['unit']}{off}", None if f["note"] else f["is_right"]
            claims.append(_claim(row, f"{f['model']}{length}, 16 bits", goal, said, is_met))
    live = [row for row in newest(rows, "kind", "format") if row.fields["what"] == "live"]
    for kind in dict.fromkeys(row.fields["kind"] for row in live):
        own = [row for row in live if row.fields["kind"] == kind]
        num_equal = sum(row.fields["is_equal"] for row in own)
        said = f"{num_equal} of {len(own)} formats to the byte"
        what = f"{kind}: predicted bytes are those of cache.stats(), used and reserved"
        claims.append(_claim(own[-1], what, "all formats", said, num_equal == len(own)))
    return claims


def _number(value: float) -> str:
    return f"{round(value, 2):,.10g}"


def _why(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "model", "what", "new_tokens", "tile"):
        f = row.fields
        if f["what"] == "decoding":
            n = f["new_tokens"]
            goal = f"{n * (n + 1) // 2:,} against {n:,} queries a layer, the same tokens"
            said = (
                f"{f['naive_queries']:,} against {f['cached_queries']:,} (scores: {f['naive_scores']:,} against "
                f"{f['cached_scores']:,}); {f['speed_up']:.1f}x faster"
            )
            counted = (f["naive_queries"], f["cached_queries"]) == (n * (n + 1) // 2, n)
            claims.append(_claim(row, f"{n} tokens, naive against cached", goal, said, counted and f["is_equal"]))
    tiles = [row for row in newest(rows, "what", "tile", "keys") if row.fields["what"] == "tiling"]
    if tiles:
        worst = max(row.fields["max_error"] for row in tiles)
        sizes = sorted(row.fields["score_bytes"] / 2**20 for row in tiles)
        said = (
            f"at most {worst:.1e} off over {len(tiles)} widths, {sizes[0]:.3g} to {sizes[-1]:.3g} MiB of scores alive"
        )
        claims.append(_claim(tiles[-1], "tiled softmax equals one-shot softmax", "within 1e-5", said, worst < 1e-5))
    return claims


def _kernels(rows: Sequence[Found]) -> list[Claim]:
    """Return claims of rung 2: kernels compiled ahead of time."""
    by_card: dict[str, list[Found]] = defaultdict(list)
    for row in newest(rows, "card", "case", "tile", "warps", "stages"):
        by_card[str(row.fields.get("card", row.where))].append(row)
    claims = []
    for card, own in sorted(by_card.items()):
        good = sum(not row.fields.get("wrong") for row in own)
        said = f"{good} of {len(own)} without a complaint"
        what = f"kernels compile for {card}: no spill, shared memory fits, matrix units used"
        claim = _claim(own[-1], what, "all", said, good == len(own), "kernels")
        compiler = own[-1].fields.get("triton")
        claims.append(claim._replace(where=f"{card}, ahead of time by Triton {compiler}" if compiler else card))
    return claims


def _gpu(rows: Sequence[Found]) -> list[Claim]:
    """Return claims of rung 4: checks and speed on a GPU."""
    checks = [row for row in rows if "passed" in row.fields]
    claims = []
    if checks:
        passed = sum(bool(row.fields["passed"]) for row in checks)
        said = f"{passed} of {len(checks)} checks"
        claims.append(_claim(checks[-1], "kernels are right on the card", "all", said, passed == len(checks), "gpu"))
    for row in rows:
        if row.fields.get("over_best_peer") is not None:
            what = ", ".join(
                str(row.fields[k]) for k in ("bench", "head_dim", "batch", "length", "format") if k in row.fields
            )
            claims.append(_claim(row, what, "-", f"{row.fields['over_best_peer']:.2f}x of the best peer", None, "gpu"))
    return claims


def _bars(rows: Sequence[Found]) -> list[Claim]:
    """Return claims of any eval that writes its goals into its rows, as `bar` or `bars`."""
    claims = []
    for row in newest(rows, *_identity(rows)):
        bars = row.fields.get("bars") or ([row.fields["bar"]] if isinstance(row.fields.get("bar"), dict) else [])
        for bar in bars:
            name = bar.get("name") or bar.get("metric") or "goal"
            claims.append(_claim(row, f"{_label(row)}: {name}".lstrip(": "), *_bar(bar)))
    return claims


def _acceptance(rows: Sequence[Found]) -> list[Claim]:
    claims = []
    for row in newest(rows, "model", "side", "batch", "temperature", "device"):
        f = row.fields
        what = f"{f['side']}, {f['model']}, batch {f['batch']}, temperature {f['temperature']:g}"
        claims += [
            _claim(row, f"{what}: {_NAMES.get(b['metric'], b['metric'])}", *_bar(b)) for b in f.get("bars") or []
        ]
        speed = f"{f['tokens_per_s']:.0f} tokens/s, {f['speedup_dynamic']:.2f}x of DynamicCache"
        claims.append(_claim(row, what, "-", speed, None))
    return claims


_LABELS = ("model", "side", "cache", "policy", "drafter", "hit", "prompt_len", "batch", "block_size", "what")


def _identity(rows: Sequence[Found]) -> list[str]:
    """Return the fields, of text and whole numbers, that distinguish configurations."""
    skip = {"date", "revision"}
    names = {name for row in rows for name, value in row.fields.items() if isinstance(value, str | int | bool)}
    return sorted(names & set(_LABELS) - skip)


def _label(row: Found) -> str:
    return ", ".join(f"{name} {row.fields[name]}" for name in _LABELS if row.fields.get(name) not in (None, ""))


READERS: dict[str, Reader] = {
    "equality": _equality,
    "speed-bar": _speed_bars,
    "speed": _speed,
    "perplexity": _perplexity,
    "needle": _needle,
    "memory": _memory,
    "prefix": _prefix,
    "fragmentation": _fragmentation,
    "acceptance": _acceptance,
    "kernels": _kernels,
    "gpu": _gpu,
    "why": _why,
}
