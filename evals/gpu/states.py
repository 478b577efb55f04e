"""Inputs of the GPU evals, and the bound on a result's distance from float32; pools are filled through `store_kv`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evals.gpu.time import Bench
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, attention_reference, gather_reference, visible_pairs
from hf_kvopt.kernels.store import store_kv
from hf_kvopt.quant import get_format

Row = dict[str, Any]


def used_bytes(kv: PagedKV) -> int:
    """Return the bytes of keys, values and scales that attention to all rows has to read."""
    tokens = int(kv.seq_lens.sum())
    parts = (kv.k_pool, kv.v_pool, kv.k_scale, kv.v_scale)
    return sum(tokens * part[0, 0].numel() * part.element_size() for part in parts if part is not None)


def make_pools(
    bench: Bench,
    seq_lens: list[int],
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    format_name: str,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
) -> PagedKV:
    """Fill pools with noise, row by row, through `store_kv`; blocks are permuted, and unowned slots are NaN."""
    fmt = get_format(format_name)
    counts = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(counts) + 1
    shape = (num_blocks, block_size, num_kv_heads)
    pools, scales = [], []
    for dim in (k_dim, v_dim):
        pool = torch.empty(*shape, fmt.packed_dim(dim), dtype=fmt.code_dtype or dtype, device=bench.device)
        pool.view(torch.uint8).fill_(0x7F) if pool.element_size() == 1 else pool.fill_(torch.nan)
        pools.append(pool)
        scale = torch.full((*shape, *fmt.scale_shape), torch.nan, dtype=torch.float16, device=bench.device)
        scales.append(scale if fmt.has_scale else None)
    order = torch.randperm(num_blocks, device=bench.device).to(torch.int32)
    table = torch.full((len(seq_lens), max(1, *counts)), -1, dtype=torch.int32, device=bench.device)
    first = 0
    for row, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        table[row, :count] = order[first : first + count]
        first += count
        positions = torch.arange(length, device=bench.device)
        slots = table[row].long()[positions // block_size] * block_size + positions % block_size
        k, v = (bench.rand(1, length, num_kv_heads, d, dtype=dtype).transpose(1, 2) for d in (k_dim, v_dim))
        store_kv(k, v, pools[0], pools[1], slots, scales[0], scales[1])
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=bench.device)
    return PagedKV(pools[0], pools[1], table, lens, scales[0], scales[1])


def check_paged_rows(
    bench: Bench,
    got: AttentionOut,
    q: Tensor,  # [batch, num_heads, q_len, k_dim]
    pools: PagedKV,
    pattern: Pattern,
    rows: slice = slice(None),
) -> Row:
    """Compare some rows of a paged op with float32 attention over the stored values."""
    table, lens = pools.block_table[rows], pools.seq_lens[rows]
    k = gather_reference(pools.k_pool, pools.k_scale, table, lens)
    v = gather_reference(pools.v_pool, pools.v_scale, table, lens)
    if pattern.mask is not None:
        k, v = (x[:, :, : pattern.mask.shape[3]] for x in (k, v))
    seen = visible_pairs(q.shape[2], lens, k.shape[2], pattern.is_causal, pattern.window, pattern.starts)
    part = AttentionOut(got.out[rows], None if got.lse is None else got.lse[rows])
    return compare(bench, part, q[rows], k, v, seen, pattern)


def compare(
    bench: Bench,
    got: AttentionOut,
    q: Tensor,  # [batch, num_heads, q_len, k_dim] as given to the kernel
    k: Tensor,  # [batch, num_kv_heads, kv_len, k_dim] of any dtype
    v: Tensor,
    seen: Tensor,  # [batch, 1, q_len, kv_len]
    pattern: Pattern,
) -> Row:
    """Compare a result with float32: at most 2x the error of plain torch in q's dtype, by maximum and by mean square.

    The mean square shows what the maximum, set by rows of one or two keys, hides: one key too many of 500 is 4 % of it,
    bfloat16's own error 0.3 %.
    """
    extras = (pattern.scale, pattern.softcap, pattern.sinks, pattern.mask)
    exact = attention_reference(q.float(), k.float(), v.float(), seen, *extras)
    honest = _plain(q, k, v, seen, *extras).float() - exact.out
    error = got.out.float() - exact.out
    # The interpreter truncates float32 where a GPU rounds it to bfloat16.
    slack = 4 if bench.rehearsal else 2
    row: Row = {
        "max_error": _largest(error),
        "max_allowed": slack * _largest(honest) + 5e-5,
        "rms_error": _rms(error),
        "rms_allowed": slack * _rms(honest) + 5e-6,
    }
    passed = row["max_error"] <= row["max_allowed"] and row["rms_error"] <= row["rms_allowed"]
    if got.lse is not None and exact.lse is not None:
        finite = exact.lse != -torch.inf
        row["lse_error"] = _largest((got.lse - exact.lse)[finite])
        # Scores of bfloat16 operands are exact products summed in float32; float16 keys are scaled by powers of two.
        passed &= row["lse_error"] <= 1e-3 and torch.equal(got.lse == -torch.inf, ~finite)
    return row | {"passed": bool(passed and got.out.isfinite().all())}


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Return attention as plain torch computes it in q's dtype, [batch, q_len, num_heads, v_dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        seen = seen & mask
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def _largest(error: Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()
