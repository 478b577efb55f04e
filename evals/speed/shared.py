"""`python -m evals.speed.shared`: decoding of rows that begin with the same tokens, read once for all or row by row.

    step         a whole step of the random `bench` shape, with as many KV heads as asked for
    attention    the kernel alone, over as many layers as the model has, so that none finds its blocks in a cache

Both read the very same blocks and are run in turn; their results are compared bit for bit before a row is written. The
time of a single thread is taken by its own clock, which does not count what other programs take.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaForCausalLM

from evals._common.cli import RESULTS, Parser, at_least
from evals._common.rows import append_rows, provenance
from evals._common.screen import show_table
from evals._common.shapes import random_model
from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache
from hf_kvopt.kernels.calls import SharedBlocks
from hf_kvopt.kernels.cpu import paged_attention
from hf_kvopt.kernels.cpu.address import PoolAddress, address_of
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.quant import get_format, quantize

BLOCK_SIZE = 16


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.speed.shared", description=(__doc__ or "").split("\n\n")[0])
    for name, default, text in (
        ("rows", 8, "rows of the batch"), ("shared", 4096, "tokens that all rows begin with"),
        ("own", 128, "tokens of each row behind them"), ("repeats", 30, "turns, of which the best counts"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=at_least(1), default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--kv-heads", nargs="+", type=at_least(1), default=[2, 8], help="of 8 query heads (2 8)")
    parser.add_argument(
        "--formats", nargs="+", default=["native", "int8", "fp8_e4m3"], help="of the attention alone (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "speed-cpu.json", help="%(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write; return 1 where reading once changed a bit."""
    facts, rows, wrong = provenance(torch.device("cpu")), [], 0
    for kv_heads in args.kv_heads:
        jobs = [("attention", fmt, attention_of(args, kv_heads, fmt)) for fmt in args.formats]
        jobs.append(("step", "native", step_of(args, kv_heads)))
        for what, fmt, work in jobs:
            if not all(torch.equal(a, b) for a, b in zip(work(False), work(True), strict=True)):
                print(f"{what} of {kv_heads} KV heads, {fmt}: DIFFERS", file=sys.stderr)
                wrong += 1
                continue
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(args.repeats):
                for once, known in times.items():
                    known.append(time_ms(work, once))
            alone, together = min(times[False]), min(times[True])
            rows.append(
                {"eval": "speed-shared", "what": what, "model": f"random-bench-{kv_heads}-kv-heads", "format": fmt,
                 "rows": args.rows, "shared": args.shared, "own": args.own, "repeats": args.repeats,
                 "row_by_row_ms": alone, "once_ms": together, "speedup": alone / together}
            )  # fmt: skip
            append_rows(args.out, [{**rows[-1], **facts}])
    show_table(
        f"{args.rows} rows, {args.shared} tokens shared and {args.own} of their own, best of {args.repeats}",
        ["", "KV heads", "format", "row by row ms", "once ms", "times"],
        [
            [r["what"], r["model"].split("-")[2], r["format"], f"{r['row_by_row_ms']:.2f}", f"{r['once_ms']:.2f}",
             f"{r['speedup']:.2f}"]
            for r in rows
        ],
    )  # fmt: skip
    return int(wrong > 0)


def time_ms(work: Callable[[bool], Any], once: bool) -> float:
    """Time one call: by the thread's own clock where it is alone, else by the wall's."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work(once)
    return 1e3 * (clock() - start)


@torch.no_grad()
def step_of(args: argparse.Namespace, kv_heads: int) -> Callable[[bool], list[torch.Tensor]]:
    """Fill a cache whose rows share their beginning; returns a step of one token a row, which is taken back."""
    model: LlamaForCausalLM = random_model("bench", num_key_value_heads=kv_heads)
    model.set_attn_implementation(ATTENTION_NAME)
    cache = PagedCache(model.config)
    draw = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(1, model.config.vocab_size, shape, generator=draw)

    model(ids(1, args.shared), **{CACHE_KEYWORD: cache}, logits_to_keep=1)
    cache.batch_repeat_interleave(args.rows)
    model(ids(args.rows, args.own), **{CACHE_KEYWORD: cache}, logits_to_keep=1)
    token = ids(args.rows, 1)

    @torch.no_grad()
    def step(once: bool) -> list[torch.Tensor]:
        with mock.patch.object(paged_attention, "MIN_SAVED_BYTES", 0 if once else 1 << 60):
            logits = model(token, **{CACHE_KEYWORD: cache}).logits
        cache.crop(-1)
        return [logits]

    return step


def attention_of(args: argparse.Namespace, kv_heads: int, fmt: str) -> Callable[[bool], list[torch.Tensor]]:
    """Make the blocks of 8 layers; returns the attention of one query a row over all of them."""
    count, own = -(-args.shared // BLOCK_SIZE), -(-args.own // BLOCK_SIZE)
    prefix = torch.arange(count).expand(args.rows, -1)
    table = torch.cat([prefix, count + torch.arange(args.rows * own).view(args.rows, -1)], 1).int().contiguous()
    lens = torch.full((args.rows,), count * BLOCK_SIZE + args.own, dtype=torch.int32)
    draw = torch.Generator().manual_seed(0)
    shape = (kv_heads, count + args.rows * own, BLOCK_SIZE, 64)
    held = []  # addresses and, so that they hold, the tensors
    layers: list[tuple[PoolAddress | None, ...]] = []
    for _ in range(8):
        pools = [quantize(torch.randn(shape, generator=draw), get_format(fmt), torch.float16) for _ in range(2)]
        planes = [[None if x is None else x.movedim(0, 2) for x in pool] for pool in pools]
        held.append(planes)
        layers.append(tuple(address_of(*plane) for plane in planes))
    q = torch.randn(args.rows, 8, 1, 64, generator=draw)
    tokens = count * BLOCK_SIZE // 64 * 64
    shared = SharedBlocks(torch.tensor([tokens], dtype=torch.int32), tokens, (args.rows - 1) * tokens)

    def attend(once: bool, _held: Any = held) -> list[torch.Tensor]:
        given = shared if once else None
        pattern = Pattern(0.125)
        return [paged_attention.attend_blocks(q, k, v, table, lens, None, pattern, shared=given) for k, v in layers]

    return attend


if __name__ == "__main__":
    sys.exit(make_parser().run(run))
