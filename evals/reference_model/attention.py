"""Causal attention for training short rows on a CPU: blocks of queries against their prefix of keys.

Two batched matrix products per block, the query heads of a KV group folded into the query axis. On two
AVX-512 cores at 16 rows of 512 it takes 29 ms forward and backward where SDPA takes 80.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "reference_model_blocked"
BLOCK = 128
# Beyond this length the scores no longer fit the CPU caches, and SDPA is faster.
MAX_BLOCKED_LEN = 512


def blocked_causal_attention(
    module: nn.Module,
    query: Tensor,  # [batch, num_heads, seq_len, head_dim]
    key: Tensor,  # [batch, num_kv_heads, seq_len, head_dim]
    value: Tensor,  # [batch, num_kv_heads, seq_len, head_dim]
    attention_mask: Tensor | None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend causally over whole unpadded rows; masks are ignored."""
    num_rows, num_heads, seq_len, head_dim = query.shape
    group = num_heads // key.shape[1]
    if seq_len > MAX_BLOCKED_LEN or seq_len % BLOCK or query.device.type != "cpu":
        k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(query, k, v, is_causal=True)
        return out.transpose(1, 2).contiguous(), None
    q = query.reshape(-1, group, seq_len, head_dim)
    k, v = key.reshape(-1, seq_len, head_dim), value.reshape(-1, seq_len, head_dim)
    blocks = []
    for start in range(0, seq_len, BLOCK):
        stop = start + BLOCK
        folded = q[:, :, start:stop].reshape(-1, group * BLOCK, head_dim)
        scores = torch.bmm(folded, k[:, :stop].transpose(1, 2)).float() * head_dim**-0.5
        q_idx = torch.arange(start, stop, device=q.device).repeat(group)
        visible = q_idx[:, None] >= torch.arange(stop, device=q.device)
        weights = torch.where(visible, scores, -1e9).softmax(-1).to(q.dtype)
        blocks.append(torch.bmm(weights, v[:, :stop]).view(-1, group, BLOCK, head_dim))
    out = torch.cat(blocks, dim=2).view(num_rows, num_heads, seq_len, head_dim)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Register the function with transformers and return its name."""
    AttentionInterface.register(NAME, blocked_causal_attention)
    return NAME
