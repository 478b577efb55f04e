"""Prefill and decode beside their peers in the same run; a row is timed only after its own equality check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from evals._gpu_correct import usable_formats
from evals._gpu_states import make_pools, used_bytes, worst_error
from evals._gpu_time import Bench, attempt, median_ms
from hf_kvopt.kernels import dispatch, flash_prefill
from hf_kvopt.kernels.launch import Config
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference import attention_reference

Row = dict[str, Any]
SDPA_BACKENDS = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
# What else could be the best tile on a card; `--tune` times them all.
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


def on_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Return an SDPA call that fails rather than fall back to another backend."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def bench_prefill(bench: Bench, limits: dict[str, float], tune: bool) -> Iterator[Row]:
    """Causal self-attention, 16k tokens in all, hidden size 2048, bf16; TFLOP/s count the visible half."""
    total, lengths = (64, (32, 64)) if bench.rehearsal else (16384, (1024, 2048, 4096, 8192, 16384))
    compiled_flex = torch.compile(flex_attention) if not bench.rehearsal else flex_attention
    for dim in (128, 64, 256):
        for length in lengths:
            if bench.is_late:
                yield {"bench": "prefill", "head_dim": dim, "length": length, "skipped": "out of time"}
                continue
            heads = 2 if bench.rehearsal else 2048 // dim
            q, k, v = (bench.rand(total // length, length, heads, dim).transpose(1, 2) for _ in range(3))
            flops = 2 * (total // length) * heads * length * length * dim
            row: Row = {"bench": "prefill", "head_dim": dim, "heads": heads, "length": length, "flops": flops}
            row |= check_rows(dispatch.flash_prefill(q, k, v, Pattern(dim**-0.5)).out, q, k, v)
            if not row["passed"]:
                yield row
                continue
            times = {"ours": attempt(bench, lambda: dispatch.flash_prefill(q, k, v, Pattern(dim**-0.5)))}  # noqa: B023
            for name, backend in SDPA_BACKENDS.items():
                times[name] = attempt(bench, on_backend(backend, q, k, v, is_causal=True))
            times["flex"] = attempt(bench, causal_flex(compiled_flex, q, k, v, length))
            if tune:
                times |= tuned(bench, q, k, v)
            yield row | with_rates(times, flops, limits["matmul_tflop_s"], "tflop_s", 1e9)


def causal_flex(compiled_flex: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, length: int) -> Callable[[], Any]:
    """Return a FlexAttention call with a causal block mask."""
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
    return lambda: compiled_flex(q, k, v, block_mask=block_mask)


def tuned(bench: Bench, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Row]:
    """Time every candidate tile."""
    times = {}
    for config in CANDIDATES:
        times[f"ours {tuple(config)}"] = attempt(
            bench,
            lambda: flash_prefill.flash_prefill(q, k, v, Pattern(q.shape[3] ** -0.5), config=config),  # noqa: B023
        )
    return times


def check_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Row:
    """Hold 64 of the queries to float32 attention: all of them would need a score matrix."""
    length = q.shape[2]
    picked = torch.randperm(length, device=q.device)[:64].sort().values
    seen = (torch.arange(length, device=q.device) <= picked[:, None])[None, None]
    exact = attention_reference(q[:1, :, picked].float(), k[:1].float(), v[:1].float(), seen, q.shape[3] ** -0.5).out
    error = (out[:1, picked].float() - exact).abs().max().item()
    # Rounding of the probabilities and of the result, on values of at most this size.
    allowed = 4 * torch.finfo(q.dtype).eps * v[:1].float().abs().max().item()
    return {"max_error": error, "allowed": allowed, "passed": error <= allowed and bool(out.isfinite().all())}


def bench_decode(bench: Bench, limits: dict[str, float]) -> Iterator[Row]:
    """One query a row, 32 heads over 8 KV heads, head_dim 128; GB/s count the keys, values and scales of all rows."""
    lengths = (40,) if bench.rehearsal else (1024, 4096, 16384, 65536)
    for batch in (2,) if bench.rehearsal else (8, 64, 1):
        for length in lengths:
            # Ours and a dense copy for the peers, in bf16, and room to spare.
            if 3 * batch * length * 8 * 128 * 4 > bench.free_bytes():
                yield {"bench": "decode", "batch": batch, "length": length, "skipped": "not enough memory"}
                continue
            for name in usable_formats(bench):
                if bench.is_late:
                    yield {
                        "bench": "decode",
                        "batch": batch,
                        "length": length,
                        "format": name,
                        "skipped": "out of time",
                    }
                    continue
                yield decode_row(bench, limits, batch, length, name)


def decode_row(bench: Bench, limits: dict[str, float], batch: int, length: int, format_name: str) -> Row:
    """Check and time one format; native storage brings its peers along."""
    pools = make_pools(bench, [length] * batch, 8, 128, 128, format_name)
    q = bench.rand(batch, 1, 32, 128).transpose(1, 2)
    scale = 128**-0.5

    def ours() -> Tensor:
        return dispatch.paged_decode(q, pools, Pattern(scale)).out

    row: Row = {"bench": "decode", "batch": batch, "length": length, "format": format_name, "bytes": used_bytes(pools)}
    row |= worst_error(ours(), q, pools, scale)
    if not row["passed"]:
        return row
    times: dict[str, Row] = {"ours": attempt(bench, ours, graph=True)}
    if bench.device.type == "cuda":
        times["ours without graph"] = {"ms": median_ms(bench, ours)}
    if format_name == "native":
        times |= decode_peers(bench, q, pools, length)
    return row | with_rates(times, used_bytes(pools), limits["copy_gb_s"], "gb_s", 1e6)


def decode_peers(bench: Bench, q: Tensor, pools: PagedKV, length: int) -> dict[str, Row]:
    """Time SDPA and FlexAttention over dense keys and values of the same rows."""
    shape = (q.shape[0], 8, length, 128)
    k, v = (bench.rand(*shape) for _ in range(2))
    # The query heads of a KV group as queries of one head: the best that SDPA can be given at one query.
    folded = q.reshape(q.shape[0], 8, 4, 128)
    times = {}
    for name, backend in SDPA_BACKENDS.items():
        times[name] = attempt(bench, on_backend(backend, q, k, v, enable_gqa=True), graph=True)
        times[f"{name} folded"] = attempt(bench, on_backend(backend, folded, k, v), graph=True)
    compiled_flex = torch.compile(flex_attention) if not bench.rehearsal else flex_attention
    times["flex"] = attempt(bench, lambda: compiled_flex(q, k, v, enable_gqa=True), graph=True)
    return times


def with_rates(times: dict[str, Row], work: float, limit: float, unit: str, per_ms: float) -> Row:
    """Add each side's rate, its share of the card's own limit, and ours over the best peer."""
    sides = {}
    for name, timed in times.items():
        sides[name] = dict(timed)
        if "ms" in timed:
            rate = work / timed["ms"] / per_ms
            sides[name] |= {unit: rate, "share": rate / limit}
    peers = [side["ms"] for name, side in sides.items() if "ms" in side and not name.startswith("ours")]
    ours = sides.get("ours", {}).get("ms")
    return {"sides": sides, "over_best_peer": min(peers) / ours if peers and ours else None}
