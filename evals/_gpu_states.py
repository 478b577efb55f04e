"""Inputs of the GPU evals: pools filled through the kernels' own store, at permuted blocks, and dense copies."""

from __future__ import annotations

import torch
from torch import Tensor

from evals._gpu_time import Bench
from hf_kvopt.kernels import dispatch
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.reference import attention_reference, gather_reference, visible_pairs
from hf_kvopt.quant import get_format


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
    """Fill pools with noise, row by row, through `store_kv`; blocks are permuted, and what is not owned is NaN."""
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
        dispatch.store_kv(k, v, pools[0], pools[1], slots, scales[0], scales[1])
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=bench.device)
    return PagedKV(pools[0], pools[1], table, lens, scales[0], scales[1])


def dense_copy(pools: PagedKV, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return float32 `[rows, num_kv_heads, capacity, dim]` keys and values of some rows."""
    table, lens = pools.block_table[rows], pools.seq_lens[rows]
    return (
        gather_reference(pools.k_pool, pools.k_scale, table, lens),
        gather_reference(pools.v_pool, pools.v_scale, table, lens),
    )


def worst_error(
    out: Tensor,  # [batch, q_len, num_heads, v_dim] of the kernel
    q: Tensor,  # [batch, num_heads, q_len, k_dim]
    pools: PagedKV,
    scale: float,
    rows: slice = slice(0, 1),
) -> dict[str, float | bool]:
    """Compare some rows with float32 attention: error, what bf16 torch is off by, and whether 2x that holds."""
    k, v = dense_copy(pools, rows)
    seen = visible_pairs(q.shape[2], pools.seq_lens[rows], k.shape[2])
    reference = attention_reference(q[rows].float(), k, v, seen, scale).out
    group = q.shape[1] // k.shape[1]
    low_k, low_v = (x.to(q.dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q[rows] @ low_k.transpose(-1, -2) * scale).float().masked_fill(~seen, -torch.inf)
    honest = (torch.softmax(scores, dim=-1).nan_to_num(0.0).to(q.dtype) @ low_v).transpose(1, 2)
    error = (out[rows].float() - reference).abs().max().item()
    allowed = 2 * (honest.float() - reference).abs().max().item() + 1e-5
    return {"max_error": error, "allowed": allowed, "passed": bool(error <= allowed)}
