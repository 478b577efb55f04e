"""Correctness of every op at real sizes against float32, on the GPU, before any timing."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from evals.gpu.generate import generate_jobs
from evals.gpu.jobs import Job
from evals.gpu.states import check_paged_rows, compare, make_pools
from evals.gpu.time import Bench, graphed
from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, visible_pairs
from hf_kvopt.kernels.store import store_kv
from hf_kvopt.kernels.triton import ops as dispatch
from hf_kvopt.kernels.triton.launch import target_of
from hf_kvopt.kernels.triton.store_kv import store_kv_reference
from hf_kvopt.quant import FORMATS, get_format

Row = dict[str, Any]
PAGED_OPS = (("paged_decode", 1), ("paged_decode", 5), ("paged_prefill", 64))
PATTERNS = ("full", "window", "softcap", "sinks", "starts", "tree", "everything")


def usable_formats(bench: Bench) -> list[str]:
    """Return the formats that this GPU's kernels can read."""
    target = target_of(torch.empty(1, device=bench.device))
    return [
        name
        for name, fmt in FORMATS.items()
        if (fmt.min_capability or (0, 0)) <= target.capability or not target.capability[0]
    ]


def check_jobs(bench: Bench) -> list[Job]:
    """Return every check, the longest first; a rehearsal takes one of each kind."""
    small = bench.rehearsal
    formats = usable_formats(bench)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    dims = ((40, 40),) if small else ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128))
    jobs = generate_jobs(bench)
    jobs += [_flash_job(dtype, *d, "causal") for dtype, d in itertools.product(dtypes, dims)]
    jobs += [
        _flash_job(dtype, d, d, pattern)
        for dtype, d, pattern in itertools.product(
            dtypes[:1] if small else dtypes, (32,) if small else (64, 128), (*PATTERNS, "packed")
        )
    ]
    jobs += [
        _paged_job(name, op, q_len, dim, block_size, "causal")
        for (op, q_len), name, dim, block_size in itertools.product(
            PAGED_OPS[:1] if small else PAGED_OPS,
            formats,
            (32,) if small else (64, 128, 256),
            (16,) if small else (16, 64),
        )
    ]
    jobs += [
        _paged_job(
            name,
            op,
            5 if op == "paged_decode" else (8 if small else 64),
            32 if small else 128,
            16 if small else 64,
            pattern,
        )
        for op, name, pattern in itertools.product(
            ("paged_decode", "paged_prefill"),
            ("int8",) if small else ("native", "int8", "int4"),
            ("tree", "everything"),
        )
    ]
    jobs += [Job(f"store_kv {name}", check_store, (name,), f"store_kv {name}") for name in formats]
    return [*jobs, Job("paged_decode replayed while lengths change", check_graph, (), "paged_decode native")]


def _flash_job(dtype: torch.dtype, k_dim: int, v_dim: int, pattern: str) -> Job:
    name = str(dtype).removeprefix("torch.")
    return Job(
        f"flash_prefill {name} {k_dim}/{v_dim} {pattern}", check_flash, (dtype, k_dim, v_dim, pattern),
        f"flash_prefill {name}",
    )  # fmt: skip


def _paged_job(format_name: str, op: str, q_len: int, dim: int, block_size: int, pattern: str) -> Job:
    return Job(
        f"{op} {format_name} {dim} q{q_len} block {block_size} {pattern}", check_paged,
        (format_name, op, q_len, dim, block_size, pattern), f"{op} {format_name}",
    )  # fmt: skip


def make_pattern(bench: Bench, name: str, batch: int, num_heads: int, q_len: int, kv_len: int, scale: float) -> Pattern:
    """Return a pattern by name; `everything` combines all of them except the mask."""
    starts = torch.arange(batch, dtype=torch.int32, device=bench.device) * (kv_len // 7)
    extras: dict[str, dict[str, Any]] = {
        "causal": {},
        "packed": {},
        "full": {"is_causal": False},
        "window": {"window": kv_len // 4},
        "softcap": {"softcap": 20.0},
        "sinks": {"sinks": bench.rand(num_heads)},
        "starts": {"starts": starts},
        "everything": {"window": kv_len // 4, "softcap": 20.0, "sinks": bench.rand(num_heads), "starts": starts},
    }
    if name != "tree":
        return Pattern(scale, **extras[name])
    # New tokens see all past ones, and their ancestors in a binary tree.
    mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=bench.device)
    ancestors = torch.eye(q_len, dtype=torch.bool, device=bench.device)
    for node in range(1, q_len):
        ancestors[node] |= ancestors[(node - 1) // 2]
    mask[..., kv_len - q_len :] = ancestors
    return Pattern(scale, is_causal=False, mask=mask)


def check_store(bench: Bench, format_name: str) -> Row:
    """Check that codes and scales equal the torch reference bit for bit, on a CPU, which divides where CUDA multiplies.

    With int4 one vector in a thousand may have another scale: the best of several by an error whose sum is rounded in
    another order.
    """
    fmt = get_format(format_name)
    tokens = 16 if bench.rehearsal else 4096
    heads, dim = (2, 32) if bench.rehearsal else (8, 128)
    k = bench.rand(1, tokens, heads, dim).transpose(1, 2)
    slots = torch.randperm(tokens, device=bench.device)
    codes, scales = [], []
    for op, device in ((store_kv, bench.device), (store_kv_reference, torch.device("cpu"))):
        shape = (tokens // 16, 16, heads)
        pool = torch.zeros(*shape, fmt.packed_dim(dim), dtype=fmt.code_dtype or k.dtype, device=device)
        scale = torch.zeros(*shape, *fmt.scale_shape, dtype=torch.float16, device=device)
        own = (scale, scale.clone()) if fmt.has_scale else (None, None)
        states = k.to(device)
        op(states, states, pool, pool.clone(), slots.to(device), *own)
        codes.append(pool.view(torch.uint8).flatten(0, 2).cpu())
        scales.append(scale.reshape(len(codes[-1]), -1).cpu())
    differs = (scales[0] != scales[1]).any(dim=1)
    codes_differ = (codes[0] != codes[1])[~differs].float().mean().item()
    scales_differ = differs.float().mean().item()
    passed = codes_differ == 0 and scales_differ <= (1e-3 if format_name == "int4" else 0)
    return {"codes_that_differ": codes_differ, "scales_that_differ": scales_differ, "passed": passed}


def check_flash(bench: Bench, dtype: torch.dtype, k_dim: int, v_dim: int, name: str) -> Row:
    """Check dense attention of 4 over 2 heads: two rows, or three sequences of different lengths packed in one."""
    length, batch = 40 if bench.rehearsal else 2048, 1 if name == "packed" else 2
    q = bench.rand(batch, length, 4, k_dim, dtype=dtype).transpose(1, 2)
    k = bench.rand(batch, length, 2, k_dim, dtype=dtype).transpose(1, 2)
    v = bench.rand(batch, length, 2, v_dim, dtype=dtype).transpose(1, 2)
    pattern = make_pattern(bench, name, batch, 4, length, length, k_dim**-0.5)
    if name == "packed":
        return _check_packed(bench, q, k, v, pattern)
    got = dispatch.flash_prefill(q, k, v, pattern, return_lse=True)
    lens = torch.full((batch,), length, device=bench.device)
    seen = visible_pairs(length, lens, length, pattern.is_causal, pattern.window, pattern.starts)
    return compare(bench, got, q, k, v, seen, pattern)


def _check_packed(bench: Bench, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Row:
    length = q.shape[2]
    bounds = torch.tensor([0, 1, length // 3, length], dtype=torch.int32, device=bench.device)
    got = dispatch.flash_prefill(q, k, v, pattern, Packed(bounds, bounds), return_lse=True)
    sequence = torch.bucketize(torch.arange(length, device=bench.device), bounds[1:], right=True)
    seen = (sequence[:, None] == sequence).tril()[None, None]
    return compare(bench, got, q, k, v, seen, pattern)


def check_paged(bench: Bench, format_name: str, op_name: str, q_len: int, dim: int, block_size: int, name: str) -> Row:
    """Check paged ops over uneven rows, one of them empty, with NaN in all slots that no row owns."""
    lens = [0, 1, 18] if bench.rehearsal else [0, 1, 4097, 16384]
    if name == "tree":
        # The mask is laid out for one length.
        lens = lens[-1:] * 2
    kv_heads = 1 if bench.rehearsal else 2
    pools = make_pools(bench, lens, kv_heads, dim, dim, format_name, block_size=block_size)
    q = bench.rand(len(lens), q_len, 4 * kv_heads, dim).transpose(1, 2)
    pattern = make_pattern(bench, name, len(lens), 4 * kv_heads, q_len, lens[-1], dim**-0.5)
    op = getattr(dispatch, op_name)
    got: AttentionOut = op(q, pools, pattern, return_lse=True)
    return check_paged_rows(bench, got, q, pools, pattern)


def check_graph(bench: Bench) -> Row:
    """Check that one CUDA graph stays right when the lengths on the device change between replays."""
    heads, dim, longest = (1, 32, 64) if bench.rehearsal else (2, 128, 8192)
    pools = make_pools(bench, [longest] * 4, heads, dim, dim, "native", block_size=16 if bench.rehearsal else 64)
    q = bench.rand(4, 1, 4 * heads, dim).transpose(1, 2)
    pattern = Pattern(0.1)
    results: list[AttentionOut] = []

    def call() -> None:
        results.append(dispatch.paged_decode(q, pools, pattern, return_lse=True))

    replay = graphed(call) if bench.device.type == "cuda" else call
    rows = []
    for lens in ([longest, 1, 0, 33], [5, longest - 1, longest // 2, 64], [0, 0, 0, 1]):
        pools.seq_lens.copy_(torch.tensor(lens))
        replay()
        rows.append(check_paged_rows(bench, results[-1], q, pools, pattern))
    return {"replays": rows, "passed": all(row["passed"] for row in rows)}
