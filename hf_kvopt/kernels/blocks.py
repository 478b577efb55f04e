"""Tensors in blocks, [num_blocks, block_size, num_kv_heads, ...], read and written by slot.

A slot is the place of one token: block number * block_size + offset in the block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def strided(
    x: Tensor,  # [num_blocks, block_size, num_kv_heads, ...]
    first: int,
    pitch: int,
    batch: int,
    length: int,
) -> Tensor:
    """Return the view [batch, num_kv_heads, length, ...] whose row r begins at slot first + r * pitch."""
    _, slot, head, *tail = x.stride()
    _, _, num_heads, *sizes = x.shape
    return x.as_strided((batch, num_heads, length, *sizes), (pitch * slot, head, slot, *tail), first * slot)


def gathered(
    x: Tensor,  # [num_blocks, block_size, num_kv_heads, ...]
    slots: Tensor,  # [batch, kv_len] int64
) -> Tensor:
    """Return a copy of the tokens at `slots`, [batch, num_kv_heads, kv_len, ...]."""
    heads_first = x.movedim(2, 0)
    if not heads_first.is_contiguous():
        return x.flatten(0, 1)[slots].transpose(1, 2)
    picked = heads_first.flatten(1, 2).index_select(1, slots.reshape(-1))
    return picked.unflatten(1, tuple(slots.shape)).transpose(0, 1)


def row_views(
    x: Tensor,  # [num_blocks, block_size, num_kv_heads, ...]
    batch: int,
) -> Tensor:
    """Return the view [batch, num_kv_heads, row capacity, ...] of a pool that rows share evenly, in order."""
    return x.view(batch, -1, *x.shape[2:]).transpose(1, 2)


def scatter(
    x: Tensor,  # [num_blocks, block_size, num_kv_heads, ...]
    slots: Tensor,  # [batch * tokens] int64, none of them twice; -1 to skip
    new: Tensor,  # [batch, num_kv_heads, tokens, ...]
) -> None:
    """Write `new` at `slots`."""
    tokens = new.transpose(1, 2).flatten(0, 1).to(x.dtype)
    is_kept = slots >= 0
    if not bool(is_kept.all()):
        slots, tokens = slots[is_kept], tokens[is_kept]
    # index_put knows no float8: its bytes are written.
    as_bytes = torch.uint8 if x.element_size() == 1 else x.dtype
    x.view(-1, *x.shape[2:]).view(as_bytes).index_put_((slots,), tokens.view(as_bytes))
