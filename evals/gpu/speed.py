"""Speed of prefill and decode beside their peers in the same run; a row is timed only after its own equality check."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from evals.gpu.correct import usable_formats
from evals.gpu.jobs import BYTES_PER_WORKER, Job
from evals.gpu.states import check_paged_rows, compare, make_pools, used_bytes
from evals.gpu.time import Bench, attempt, median_ms
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut
from hf_kvopt.kernels.triton import flash_prefill
from hf_kvopt.kernels.triton import ops as dispatch
from hf_kvopt.kernels.triton.launch import Config

Row = dict[str, Any]
SDPA_BACKENDS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
# The most important first: time may run out.
PREFILL_LENGTHS = (4096, 16384, 8192, 1024, 2048)  # 16k tokens in all, hidden size 2048
DECODE_SIZES = (
    (8, 65536), (64, 4096), (64, 16384), (8, 16384), (1, 65536), (64, 65536),
    (8, 4096), (64, 1024), (1, 16384), (8, 1024), (1, 4096), (1, 1024),
)  # fmt: skip
# Other candidates for the best tile on a GPU; `--tune` times them all.
CANDIDATES = [
    Config(128, 128, 8, 2, tma=True),
    Config(128, 128, 8, 3, tma=True),
    Config(128, 64, 8, 3, tma=True),
    Config(128, 64, 4, 3, tma=True),
    Config(64, 64, 4, 2, tma=True),
    Config(64, 128, 4, 2, tma=True),
    Config(128, 128, 8, 2),
    Config(128, 64, 8, 3),
]


def warm_jobs(bench: Bench) -> list[Job]:
    """Return calls that compile what the timed parts launch; one of each in a rehearsal, which compiles nothing."""
    formats = usable_formats(bench)
    if bench.rehearsal:
        return [Job("prefill", warm_prefill, (32, 32)), Job("decode", warm_decode, (2, 40, "native"))]
    prefill = [Job(f"prefill {dim} {n}", warm_prefill, (dim, n)) for dim in (128, 64, 256) for n in PREFILL_LENGTHS]
    # Another format is another kernel, another batch size a constant of it; a length is neither.
    decode = [Job(f"decode {b} {name}", warm_decode, (b, 1024, name)) for name in formats for b in (8, 64, 1)]
    # For the peers, each size is another kernel.
    return prefill + decode + [Job(f"decode peers {b} {n}", warm_decode_peers, (b, n)) for b, n in DECODE_SIZES]


def prefill_inputs(bench: Bench, dim: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [batch, heads, length, dim]: 16k tokens in all, hidden size 2048."""
    total, heads = (64, 2) if bench.rehearsal else (16384, 2048 // dim)
    q, k, v = (bench.rand(total // length, length, heads, dim).transpose(1, 2) for _ in range(3))
    return q, k, v


def warm_prefill(bench: Bench, dim: int, length: int) -> Row:
    """Compile ours and FlexAttention for one size."""
    q, k, v = prefill_inputs(bench, dim, length)
    dispatch.flash_prefill(q, k, v, Pattern(dim**-0.5))
    causal_flex(bench, q, k, v)()
    return {}


def warm_decode(bench: Bench, batch: int, length: int, format_name: str) -> Row:
    """Compile ours for one batch size and format, with and without splits."""
    q, pools = decode_inputs(bench, batch, length, format_name)
    dispatch.paged_decode(q, pools, Pattern(q.shape[3] ** -0.5))
    return {}


def warm_decode_peers(bench: Bench, batch: int, length: int) -> Row:
    """Compile FlexAttention for one size."""
    shape = (batch, 8, length, 128)
    # Other processes use the GPU too.
    if 2 * 2 * batch * 8 * length * 128 > BYTES_PER_WORKER:
        return {"skipped": "too large beside the others"}
    decode_flex(bench, bench.rand(batch, 32, 1, 128), bench.rand(*shape), bench.rand(*shape))()
    return {}


def on_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Return an SDPA call that fails instead of falling back to another backend."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def compiled_flex(bench: Bench) -> Callable[..., Any]:
    """Return FlexAttention, compiled for the static shapes of its next call."""
    if bench.rehearsal:
        return flex_attention
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def causal_flex(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """Return a FlexAttention call with a causal block mask."""
    length = q.shape[2]
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
    flex = compiled_flex(bench)
    return lambda: flex(q, k, v, block_mask=block_mask)


def decode_flex(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """Return a FlexAttention call of one query a row."""
    flex = compiled_flex(bench)
    return lambda: flex(q, k, v, enable_gqa=True)


def bench_prefill(bench: Bench, limits: dict[str, float], failed: set[str], tune: bool) -> Iterator[Row]:
    """Yield rows of causal self-attention in bf16; TFLOP/s count the visible half."""
    for dim in (32,) if bench.rehearsal else (128, 64, 256):
        for length in (32, 64) if bench.rehearsal else PREFILL_LENGTHS:
            row: Row = {"bench": "prefill", "head_dim": dim, "length": length}
            reason = skipped(bench, {"flash_prefill bfloat16"} & failed)
            yield row | ({"skipped": reason} if reason else prefill_row(bench, limits, dim, length, tune))


def prefill_row(bench: Bench, limits: dict[str, float], dim: int, length: int, tune: bool) -> Row:
    """Check and time one size."""
    q, k, v = prefill_inputs(bench, dim, length)
    batch, heads = q.shape[:2]
    flops = 2 * batch * heads * length * length * dim
    ours = functools.partial(dispatch.flash_prefill, q, k, v, Pattern(dim**-0.5))
    row: Row = {"heads": heads, "flops": flops, **check_rows(bench, ours().out, q, k, v)}
    if not row["passed"]:
        return row
    times = {"ours": attempt(bench, ours)}
    for name, backend in SDPA_BACKENDS.items():
        times[name] = attempt(bench, on_backend(backend, q, k, v, is_causal=True))
    times["flex"] = attempt(bench, causal_flex(bench, q, k, v))
    if tune:
        times |= tuned(bench, q, k, v)
    return row | with_rates(times, flops, limits["matmul_tflop_s"], "tflop_s", 1e9)


def tuned(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Row]:
    """Time every candidate tile."""
    call = functools.partial(flash_prefill.flash_prefill, q, k, v, Pattern(q.shape[3] ** -0.5))
    candidates = CANDIDATES[:1] if bench.rehearsal else CANDIDATES
    return {f"ours {tuple(c)}": attempt(bench, functools.partial(call, config=c)) for c in candidates}


def check_rows(bench: Bench, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Row:
    """Compare 64 of the first row's queries with float32 attention: all of them would need a score matrix."""
    length = q.shape[2]
    picked = torch.randperm(length, device=q.device)[:64].sort().values
    seen = (torch.arange(length, device=q.device) <= picked[:, None])[None, None]
    row = compare(
        bench, AttentionOut(out[:1, picked], None), q[:1, :, picked], k[:1], v[:1], seen, Pattern(q.shape[3] ** -0.5)
    )
    return row | {"passed": row["passed"] and bool(out.isfinite().all())}


def decode_inputs(bench: Bench, batch: int, length: int, format_name: str) -> tuple[Tensor, PagedKV]:
    """Return one query of 32 heads for each row, and pools of 8 KV heads."""
    kv_heads, dim = (1, 32) if bench.rehearsal else (8, 128)
    q = bench.rand(batch, 1, 4 * kv_heads, dim).transpose(1, 2)
    return q, make_pools(bench, [length] * batch, kv_heads, dim, dim, format_name)


def bench_decode(bench: Bench, limits: dict[str, float], failed: set[str]) -> Iterator[Row]:
    """Yield rows of one query, 32 over 8 heads of head_dim 128; GB/s count keys, values and scales of all rows."""
    for batch, length in ((2, 40),) if bench.rehearsal else DECODE_SIZES:
        native_ms: float | None = None
        for name in usable_formats(bench):
            row: Row = {"bench": "decode", "batch": batch, "length": length, "format": name}
            # Memory for ours and a dense copy for the peers, in bf16, with room to spare.
            room = None if 3 * batch * length * 8 * 128 * 4 < bench.free_bytes() else "not enough memory"
            reason = room or skipped(bench, {f"paged_decode {name}"} & failed)
            if reason:
                yield row | {"skipped": reason}
                continue
            row |= decode_row(bench, limits, batch, length, name)
            ours_ms = row.get("sides", {}).get("ours", {}).get("ms")
            if name == "native":
                native_ms = ours_ms
            yield row | ({"over_bf16": native_ms / ours_ms} if native_ms and ours_ms else {})


def skipped(bench: Bench, failed: set[str]) -> str | None:
    """Return why nothing is to be measured, or None."""
    if failed:
        return f"a check failed: {', '.join(sorted(failed))}"
    return "out of time" if bench.is_late else None


def decode_row(bench: Bench, limits: dict[str, float], batch: int, length: int, format_name: str) -> Row:
    """Check and time one format; native storage is timed beside its peers."""
    q, pools = decode_inputs(bench, batch, length, format_name)
    pattern = Pattern(q.shape[3] ** -0.5)

    def ours() -> AttentionOut:
        return dispatch.paged_decode(q, pools, pattern)

    row: Row = {"bytes": used_bytes(pools), **check_paged_rows(bench, ours(), q, pools, pattern, slice(0, 1))}
    if not row["passed"]:
        return row
    times: dict[str, Row] = {"ours": attempt(bench, ours), "ours without graph": {"ms": median_ms(bench, ours)}}
    if format_name == "native":
        times |= decode_peers(bench, q, length)
    return row | with_rates(times, used_bytes(pools), limits["copy_gb_s"], "gb_s", 1e6)


def decode_peers(bench: Bench, q: Tensor, length: int) -> dict[str, Row]:
    """Time SDPA and FlexAttention over dense keys and values of the same size."""
    shape = (q.shape[0], q.shape[1] // 4, length, q.shape[3])
    k, v = (bench.rand(*shape) for _ in range(2))
    # The query heads of a KV group as queries of one head: the best case for SDPA with one query.
    folded = q.reshape(*shape[:2], 4, shape[3])
    times = {}
    for name, backend in SDPA_BACKENDS.items():
        times[name] = attempt(bench, on_backend(backend, q, k, v, enable_gqa=True))
        times[f"{name} folded"] = attempt(bench, on_backend(backend, folded, k, v))
    return times | {"flex": attempt(bench, decode_flex(bench, q, k, v))}


def with_rates(times: dict[str, Row], work: float, limit: float, unit: str, per_ms: float) -> Row:
    """Add each side's rate, its share of the GPU's own limit, and our speed-up over the best peer."""
    sides = {}
    for name, timed in times.items():
        sides[name] = dict(timed)
        if "ms" in timed:
            rate = work / timed["ms"] / per_ms
            sides[name] |= {unit: rate, "share": rate / limit}
    peers = [side["ms"] for name, side in sides.items() if "ms" in side and not name.startswith("ours")]
    ours = sides.get("ours", {}).get("ms")
    return {"sides": sides, "over_best_peer": min(peers) / ours if peers and ours else None}
