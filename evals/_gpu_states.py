"""Inputs of the GPU evals: pools filled through the kernels' own store, at permuted blocks, and dense copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from evals._gpu_time import Bench
from hf_kvopt.kernels import dispatch
from hf_kvopt.kernels.reference import attention_reference, gather_reference, visible_pairs
from hf_kvopt.quant import get_format


class Pools(NamedTuple):
    """Paged keys and values of a batch."""

    k_pool: Tensor
    v_pool: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    block_table: Tensor
    seq_lens: Tensor

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What comes after q in a paged op."""
        return self.k_pool, self.v_pool, self.block_table, self.seq_lens

    @property
    def scales(self) -> dict[str, Any]:
        """The keyword arguments that quantized storage needs."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    @property
    def used_bytes(self) -> int:
        """Bytes of keys, values and scales that attention to all rows has to read."""
        tokens = int(self.seq_lens.sum())
        total = 0
        for part in (self.k_pool, self.v_pool, self.k_scale, self.v_scale):
            if part is not None:
                total += tokens * part[0, 0].numel() * part.element_size()
        return total


def make_pools(
    bench: Bench,
    seq_lens: list[int],
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    format_name: str,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
) -> Pools:
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
        scales.append(torch.full(shape, torch.nan, dtype=torch.float16, device=bench.device) if fmt.has_scale else None)
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
    return Pools(pools[0], pools[1], scales[0], scales[1], table, lens)


def dense_copy(pools: Pools, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return float32 `[rows, num_kv_heads, capacity, dim]` keys and values of some rows."""
    table, lens = pools.block_table[rows], pools.seq_lens[rows]
    return (
        gather_reference(pools.k_pool, pools.k_scale, table, lens),
        gather_reference(pools.v_pool, pools.v_scale, table, lens),
    )


def worst_error(
    out: Tensor,  # [batch, q_len, num_heads, v_dim] of the kernel
    q: Tensor,  # [batch, num_heads, q_len, k_dim]
    pools: Pools,
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
