"""Keys and values of a batch as they lie in blocks, as one frozen value that the paged ops take.

Token j of a row is slot j % block_size of block block_table[row, j // block_size]. Entries beyond a row's length may
hold anything. Quantized pools have a scale per token and KV head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.quant import Format, format_of


class PagedKV(NamedTuple):
    """Pools, the table that says which blocks are whose, and lengths; all on one device."""

    k_pool: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim or packed]
    v_pool: Tensor  # [num_blocks, block_size, num_kv_heads, v_dim or packed]
    block_table: Tensor  # [batch, max_blocks] int32
    seq_lens: Tensor  # [batch] int32, new tokens included
    k_scale: Tensor | None = None  # [num_blocks, block_size, num_kv_heads, *scale_shape]
    v_scale: Tensor | None = None
    # [runs] int32, leading tokens of which all batch / runs rows of a run hold the same blocks; see calls.SharedBlocks
    shared: Tensor | None = None

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


def empty_results(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """Allocate out [batch, q_len, num_heads, v_dim] and lse [batch, num_heads, q_len] float32."""
    batch, num_heads, q_len, _ = q.shape
    return q.new_empty((batch, q_len, num_heads, v_dim)), q.new_empty((batch, num_heads, q_len), dtype=torch.float32)
