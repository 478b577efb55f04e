"""`python -m evals.policies --stream 100000`: time and memory of each token of a text without end, under `SinkRecent`.

    prompt of `recent` tokens ─► token by token ─► a row every `stream / 20` tokens ─► first quarter against last

The model goes on with its own greedy text. The prompt fills what the policy keeps, so that every token that is timed is
read behind equally many others. Flat means: the median time of a token over the last quarter is within 5 % of that over
the first one, and the cache holds and reserves no more bytes in it, at most, than in the first one.
"""

import argparse
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

import hf_kvopt
from evals._common.clock import Clock
from evals._common.memory import KVBytes, kv_bytes, resident_bytes
from evals._common.models import Subject, check_length, load_subject
from evals._common.prompts import load_texts, text_facts, token_stream
from evals._common.rows import append_rows, provenance
from evals._common.screen import megabytes, show_table

MOST_SLOWER = 0.05
WINDOWS = 20
_SINKS, _CHUNK = 4, 512
_HELD = ("used_bytes", "reserved_bytes")  # most of a window: a block more or less is held within each 16 tokens


def run_stream(args: argparse.Namespace) -> int:
    """Stream, write a row as each window ends, and show them."""
    subject = load_subject(args)
    check_length(subject, args.recent + args.stream)
    facts = {"eval": "stream", "model": subject.name, "dtype": args.dtype, "format": args.format, **text_facts(args)}
    facts |= {"policy": "SinkRecent", "recent": args.recent, **provenance(subject.model.device)}
    rows: list[dict[str, Any]] = []
    for row in _windows(subject, args):
        rows.append({**facts, **row, "bar": None})
        if row["tokens"] == args.stream:
            rows[-1]["bar"] = verdict(rows)
        append_rows(args.out, rows[-1:])
    _show(subject, rows)
    return 0


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return whether time and memory stayed flat over the rows of one stream."""
    quarter = max(1, len(rows) // 4)
    first, last = (median(row["token_ms"] for row in part) for part in (rows[:quarter], rows[-quarter:]))
    held = [[max(row[name] for row in part) for part in (rows[:quarter], rows[-quarter:])] for name in _HELD]
    grown = max(after - before for before, after in held)
    slower = last / first - 1
    is_met = slower <= MOST_SLOWER and grown <= 0
    return {"most_slower": MOST_SLOWER, "slower": slower, "grown_bytes": grown, "is_met": is_met}


@torch.inference_mode()
def _windows(subject: Subject, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each window of the stream."""
    model = subject.model
    model.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
    policy = hf_kvopt.SinkRecent(_SINKS, args.recent)
    native = args.format == "native"
    cache = hf_kvopt.PagedCache(model.config, policy=policy) if native else hf_kvopt.QuantizedPagedCache(
        model.config, format=args.format, policy=policy
    )  # fmt: skip
    ids = token_stream(subject, load_texts(args), args.recent)[None].to(model.device)
    for part in ids.split(_CHUNK, dim=1):
        token = _next(subject, cache, part)
    clock, ends = Clock(model.device), [args.stream * (i + 1) // WINDOWS for i in range(WINDOWS)]
    done = 0
    for end in sorted({end for end in ends if end}):
        times, held = [], KVBytes()
        while done < end:
            fed = token
            out: list[Tensor] = []
            times.append(clock.time_ms(lambda fed=fed, out=out: out.append(_next(subject, cache, fed))))  # type: ignore[misc]
            token, done = out[0], done + 1
            held = KVBytes(*map(max, held, kv_bytes(cache)))
        yield {
            "tokens": done,
            "token_ms": median(times),
            "used_bytes": held.used,
            "reserved_bytes": held.reserved,
            "evicted": cache.stats().evicted,
            "resident_bytes": resident_bytes(model.device),
        }


def _next(subject: Subject, cache: hf_kvopt.PagedCache, ids: Tensor) -> Tensor:
    """Return the likeliest token [1, 1] behind `ids` [1, tokens]."""
    fed = {"input_ids": ids, hf_kvopt.CACHE_KEYWORD: cache, "use_cache": True, "logits_to_keep": 1}
    return subject.model(**fed).logits[:, -1:].argmax(-1)


def _show(subject: Subject, rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        [
            f"{row['tokens']:,}", f"{row['token_ms']:.2f}", f"{1e3 / row['token_ms']:.0f}",
            megabytes(row["used_bytes"]), megabytes(row["reserved_bytes"]), megabytes(row["resident_bytes"]),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["tokens", "ms a token", "tokens/s", "held", "reserved", "process"]
    bar = rows[-1]["bar"]
    said = f"{bar['slower']:+.1%} from first to last quarter, {'met' if bar['is_met'] else 'MISSED'}"
    show_table(f"a stream of {subject.name} under SinkRecent: {said}", columns, lines)
