"""Attention in float32 torch with every pattern spelled out: what each kernel is held to.

    out = softmax(softcap(q k^T * scale) + mask) v       lse = log(sum(exp(...)))

over the visible pairs (query position p, kv index j): j >= start, j <= p if causal, j > p - window, mask.
Queries are aligned bottom-right: query i of a row sits at kv_len - q_len + i. A sink is one more logit per
head that joins the denominator and has no value. A row that sees nothing gives 0 and an lse of -inf (of the
sink, if there is one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.quant import dequantize, format_of


class AttentionOut(NamedTuple):
    """Output and, where it was asked for, the log of the softmax denominator (sinks included)."""

    out: Tensor  # [batch, q_len, num_heads, v_dim]
    lse: Tensor | None  # [batch, num_heads, q_len] float32


def visible_pairs(
    q_len: int,
    kv_lens: Tensor,  # [batch] tokens of each row
    max_kv_len: int,
    is_causal: bool = True,
    window: int | None = None,
    starts: Tensor | Sequence[int] | None = None,  # [batch] first valid kv index
    q_lens: Tensor | None = None,  # [batch] queries of each row, q_len if None
) -> Tensor:
    """Return `[batch, 1, q_len, max_kv_len]` bool: which query may see which kv index."""
    j = torch.arange(max_kv_len, device=kv_lens.device)
    row_q_len = q_len if q_lens is None else q_lens[:, None]
    position = kv_lens[:, None] - row_q_len + torch.arange(q_len, device=kv_lens.device)  # [batch, q_len]
    seen = (j < kv_lens[:, None])[:, None, :].expand(-1, q_len, -1)
    if is_causal:
        seen = seen & (j <= position[..., None])
    if window is not None:
        seen = seen & (j > position[..., None] - window)
    if starts is not None:
        seen = seen & (j >= torch.as_tensor(starts, device=j.device)[:, None])[:, None, :]
    return seen[:, None]


def attention_reference(
    q: Tensor,  # [batch, num_heads, q_len, head_dim]
    k: Tensor,  # [batch, num_kv_heads, kv_len, head_dim]
    v: Tensor,  # [batch, num_kv_heads, kv_len, v_dim]
    seen: Tensor,  # [batch, 1, q_len, kv_len] bool
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [num_heads]
    mask: Tensor | None = None,  # [batch | 1, num_heads | 1, q_len | 1, >= kv_len] bool, or float to add
) -> AttentionOut:
    """Return attention in float32; keys and values that no row may see can hold anything."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        seen = seen & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)
        scores = scores if mask.dtype == torch.bool else scores + mask.float()
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    pivot = lse.where(lse != -torch.inf, 0.0)
    weights = torch.exp(scores - pivot[..., None])[..., : k.shape[2]]
    out = weights @ v.masked_fill(~seen.any(dim=(1, 2))[:, None, :, None], 0.0)
    return AttentionOut(out.transpose(1, 2).to(q.dtype).contiguous(), lse)


def gather_reference(
    pool: Tensor,  # [num_blocks, block_size, num_kv_heads, dim]
    scales: Tensor | None,  # [num_blocks, block_size, num_kv_heads, *scale_shape]
    block_table: Tensor,  # [batch, max_blocks]
    seq_lens: Tensor,  # [batch]
) -> Tensor:
    """Return `[batch, num_kv_heads, max_blocks * block_size, dim]` float32, zero outside of each row's length."""
    block_size = pool.shape[1]
    j = torch.arange(block_table.shape[1] * block_size, device=pool.device)
    inside = j < seq_lens[:, None]
    # Entries beyond a row's length may hold anything, -1 included.
    blocks = block_table.long()[:, j // block_size].where(inside, 0).clamp(min=0)
    fmt = format_of(pool.dtype)
    # Not every device indexes float8: its bytes are picked.
    stored = pool.view(torch.uint8) if pool.element_size() == 1 else pool
    picked = stored[blocks, j % block_size].view(pool.dtype)
    picked_scales = None if scales is None else scales[blocks, j % block_size]
    dense = dequantize(picked, picked_scales, fmt)
    return dense.masked_fill(~inside[:, :, None, None], 0.0).transpose(1, 2)


def paged_reference(q: Tensor, kv: PagedKV, pattern: Pattern) -> AttentionOut:
    """Gather, dequantize and attend in float32; see `paged_decode` for shapes."""
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    k = gather_reference(kv.k_pool, kv.k_scale, kv.block_table, kv.seq_lens)
    v = gather_reference(kv.v_pool, kv.v_scale, kv.block_table, kv.seq_lens)
    kv_len = k.shape[2]
    if mask is not None and mask.shape[-1] < kv_len:
        # What a mask does not reach is not seen.
        k, v, kv_len = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]], mask.shape[-1]
    seen = visible_pairs(q.shape[2], kv.seq_lens, kv_len, is_causal, window, starts)
    return attention_reference(q, k, v, seen, scale, softcap, sinks, mask)
