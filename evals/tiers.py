"""`python -m evals.tiers`: time to the first token of a known prompt, by where its keys and values lie.

A prompt is computed once and then asked for again: recomputed, on the device, from memory of the host, and from the
disk by a store that never computed anything, as in a process that was started anew. Tokens must be equal to recomputed
ones, or no row is written and the exit status is 1. The files were just written, so the system may hold them in memory.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import hf_kvopt
from evals._common.cli import RESULTS, Parser, at_least
from evals._common.clock import Clock
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.prompts import add_text_arguments, load_texts, token_stream
from evals._common.rows import append_rows, provenance
from evals._common.screen import show_table

NEW_TOKENS = 8
LEAST_SPEEDUP = 5.0  # of the disk, against computing again
PLACES = ("recomputed", "device", "host", "disk")


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.tiers", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--lengths", nargs="+", type=at_least(2), default=[1024, 4096], help="tokens (1024 4096)")
    parser.add_argument("--formats", nargs="+", default=["native", "int8"], help="storage formats (native int8)")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="%(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to append rows to (tiers-<device>.json of the results)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write; return 1 if tokens differ."""
    subject = load_subject(args)
    check_length(subject, max(args.lengths) + NEW_TOKENS)
    stream = token_stream(subject, load_texts(args), max(args.lengths))
    facts = provenance(subject.model.device)
    out = args.out or RESULTS / f"tiers-{subject.model.device.type}.json"
    lines, is_equal = [], True
    for length in args.lengths:
        for name in args.formats:
            row, same = _measure(subject, stream[None, :length], name, args.repeats)
            is_equal &= same
            if same:
                append_rows(out, [{"eval": "tiers", "model": subject.name, "dtype": args.dtype, **row, **facts}])
            times = [row[f"{place}_ms"] for place in PLACES]
            lines.append([length, name, *(f"{ms:.0f}" for ms in times), f"{times[0] / times[3]:.1f}x", same])
    columns = ["prompt", "format", *(f"{place} ms" for place in PLACES), "disk", "tokens equal"]
    show_table(f"first token of a known prompt, {subject.name} in {args.dtype}", columns, lines)
    return int(not is_equal)


def _measure(subject: Subject, ids: Tensor, name: str, repeats: int) -> tuple[dict[str, Any], bool]:
    model, times = subject.model, {place: list[float]() for place in PLACES}
    hf_kvopt.disable(model).set_attn_implementation(hf_kvopt.ATTENTION_NAME)
    ids = ids.to(model.device)
    clock, is_equal = Clock(model.device), True
    with tempfile.TemporaryDirectory() as folder:
        store = hf_kvopt.PrefixStore(model, format=name, disk_tier=folder)
        expected = _generate(subject, store, ids, NEW_TOKENS)
        store.flush()
        size = store.stats().disk_bytes
        for _ in range(repeats):
            for place in PLACES:
                used = store if place == "device" else _placed(place, subject, ids, name, folder)
                times[place].append(clock.time_ms(partial(_generate, subject, used, ids, 1)))
                is_equal &= torch.equal(_generate(subject, used, ids, NEW_TOKENS), expected)
                if used is not store:
                    used.free()
        store.free()
    medians = {f"{place}_ms": median(values) for place, values in times.items()}
    speedup = median(a / b for a, b in zip(times["recomputed"], times["disk"], strict=True))
    bar = {"least": LEAST_SPEEDUP, "is_met": speedup >= LEAST_SPEEDUP}
    facts = {"length": ids.shape[1], "format": name, "repeats": repeats, "disk_bytes": size, "disk_speedup": speedup}
    return {**facts, **medians, "bar": bar}, is_equal


def _placed(place: str, subject: Subject, ids: Tensor, name: str, folder: str) -> hf_kvopt.PrefixStore:
    """Return a store that has the prompt at `place`, and nothing on the device."""
    if place == "recomputed":
        return hf_kvopt.PrefixStore(subject.model, format=name)
    store = hf_kvopt.PrefixStore(
        subject.model, format=name, disk_tier=folder, host_tier="2GiB" if place == "host" else None
    )
    # Reads the weights, as the first prompt of a process does; asked for the prompt, it reads the files to the host.
    store.match_length(ids if place == "host" else [0] * 64)
    return store


def _generate(subject: Subject, store: hf_kvopt.PrefixStore, ids: Tensor, new_tokens: int) -> Tensor:
    mask = torch.ones_like(ids)
    cache = store.cache(ids, mask)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    output: Tensor = subject.model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, do_sample=False, pad_token_id=0, **{hf_kvopt.CACHE_KEYWORD: cache}, **length
    )
    store.commit(cache, output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
