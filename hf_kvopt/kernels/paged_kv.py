"""Keys and values of a batch as they lie in blocks, as one frozen value that the paged ops take.

Token j of a row is slot j % block_size of block block_table[row, j // block_size]. Entries beyond a row's length may
hold anything. Quantized pools have a scale per token and KV head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.checks import (
    COMPUTE_DTYPES,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_pool,
    check_shape,
    debug_enabled,
)
from hf_kvopt.kernels.pattern import Pattern, check_pattern, strides_of
from hf_kvopt.kernels.triton.launch import Config, Target, dot_dtype, next_power_of_two
from hf_kvopt.quant import Format, format_of


class PagedKV(NamedTuple):
    """Pools, the table that says which blocks are whose, and lengths; all on one device."""

    k_pool: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim or packed]
    v_pool: Tensor  # [num_blocks, block_size, num_kv_heads, v_dim or packed]
    block_table: Tensor  # [batch, max_blocks] int32
    seq_lens: Tensor  # [batch] int32, new tokens included
    k_scale: Tensor | None = None  # [num_blocks, block_size, num_kv_heads, *scale_shape]
    v_scale: Tensor | None = None

    @property
    def formats(self) -> tuple[Format, Format]:
        """The storage formats of keys and values."""
        return format_of(self.k_pool.dtype), format_of(self.v_pool.dtype)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a token."""
        return self.k_pool.shape[2]

    @property
    def v_dim(self) -> int:
        """Channels of a value."""
        return self.v_pool.shape[3] * format_of(self.v_pool.dtype).codes_per_byte

    @property
    def capacity(self) -> int:
        """Tokens that a row's table can hold."""
        return self.block_table.shape[1] * self.k_pool.shape[1]


def check_paged(q: Tensor, kv: PagedKV, pattern: Pattern, target: Target) -> None:
    """Check every argument of a paged attention op."""
    k_pool, v_pool, block_table, seq_lens, k_scale, v_scale = kv
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, *COMPUTE_DTYPES)
    check_last_contiguous("q", q)
    batch, num_heads, _, head_dim = q.shape
    k_format = check_pool("k", k_pool, k_scale, target)
    v_format = check_pool("v", v_pool, v_scale, target)
    check_shape("k_pool", k_pool, (None, None, None, head_dim // k_format.codes_per_byte))
    check_shape("v_pool", v_pool, (*k_pool.shape[:3], None))
    for name, pool, fmt in (("k_pool", k_pool, k_format), ("v_pool", v_pool, v_format)):
        if not fmt.has_scale:
            check_dtype(name, pool, q.dtype)
    if num_heads % k_pool.shape[2]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {k_pool.shape[2]}: got {num_heads}")
    check_shape("block_table", block_table, (batch, None))
    check_dtype("block_table", block_table, torch.int32)
    check_last_contiguous("block_table", block_table)
    check_shape("seq_lens", seq_lens, (batch,))
    check_dtype("seq_lens", seq_lens, torch.int32)
    check_pattern(pattern, q)
    for name, tensor in (("k_pool", k_pool), ("v_pool", v_pool), ("block_table", block_table), ("seq_lens", seq_lens)):
        check_device(name, tensor, q)
    if debug_enabled():
        check_table_values(block_table, seq_lens, k_pool.shape[0], k_pool.shape[1])


def check_table_values(block_table: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int) -> None:
    """Raise ValueError if a length exceeds the table or a used entry points outside of the pool (stops the stream)."""
    capacity = block_table.shape[1] * block_size
    longest, shortest = int(seq_lens.max()), int(seq_lens.min())
    if longest > capacity or shortest < 0:
        raise ValueError(
            f"seq_lens must lie between 0 and the table's capacity {capacity}: got {shortest} to {longest}; "
            "reserve blocks before attending"
        )
    used = torch.arange(block_table.shape[1], device=block_table.device) * block_size < seq_lens[:, None]
    # -1 is allowed: a sliding layer has freed what lies behind its window.
    wrong = used & ((block_table >= num_blocks) | (block_table < -1))
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"block_table must point into the pool of {num_blocks} blocks: got {int(block_table[row, column])} "
            f"at row {row}, column {column}; the table belongs to another pool or was not filled"
        )


def paged_args(q: Tensor, kv: PagedKV, config: Config, target: Target) -> dict[str, Any]:
    """Return queries, pools and tile sizes as arguments of a kernel, by parameter name."""
    k_format, v_format = kv.formats
    k_dim, v_dim = q.shape[3], kv.v_dim
    q_dtype, p_dtype = _operand(q.dtype, k_format, torch.float16), _operand(q.dtype, v_format, torch.bfloat16)
    return {
        "q_ptr": q,
        "k_ptr": _as_stored(kv.k_pool, k_format),
        "v_ptr": _as_stored(kv.v_pool, v_format),
        "k_scale_ptr": kv.k_scale,
        "v_scale_ptr": kv.v_scale,
        "block_table_ptr": kv.block_table,
        "seq_lens_ptr": kv.seq_lens,
        "q_len": q.shape[2],
        **strides_of("q", q, "bhm"),
        "stride_table_b": kv.block_table.stride(0),
        "NUM_KV_HEADS": kv.num_kv_heads,
        "GROUP": q.shape[1] // kv.num_kv_heads,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        # A product's operands have 16 channels a plane at least.
        "K_BLOCK": max(16 * _planes(k_format), next_power_of_two(k_dim)),
        "V_BLOCK": max(16 * _planes(v_format), next_power_of_two(v_dim)),
        "K_PLANES": _planes(k_format),
        "V_PLANES": _planes(v_format),
        "K_CODES": k_format.name,
        "V_CODES": v_format.name,
        "K_BIASED": k_format.name in ("int8", "int4") and q_dtype == torch.float16 and target.family != "cdna3",
        "PTX": target.family.startswith("sm"),
        "BLOCK_SIZE": kv.k_pool.shape[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "Q_DTYPE": dot_dtype(q_dtype, target),
        "P_DTYPE": dot_dtype(p_dtype, target),
    }


def _operand(dtype: torch.dtype, fmt: Format, quantized: torch.dtype) -> torch.dtype:
    """Return the dtype of products with stored values: the queries', float32 or what codes are turned into."""
    return quantized if fmt.has_scale and dtype != torch.float32 else dtype


def _as_stored(pool: Tensor, fmt: Format) -> Tensor:
    """Return the pool as kernels read it: codes as int16."""
    return pool.view(torch.int16) if fmt.has_scale else pool


def _planes(fmt: Format) -> int:
    """Return the codes of one int16, 1 for native storage."""
    return 2 * fmt.codes_per_byte if fmt.has_scale else 1


def empty_results(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """Allocate out [batch, q_len, num_heads, v_dim] and lse [batch, num_heads, q_len] float32."""
    batch, num_heads, q_len, _ = q.shape
    return q.new_empty((batch, q_len, num_heads, v_dim)), q.new_empty((batch, num_heads, q_len), dtype=torch.float32)
