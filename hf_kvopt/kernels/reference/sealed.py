"""Attention over sealed and exact blocks in float32 torch, from the states as they came: what each kernel is held to.

    position p in block i reads block b     as it came where b = 0 or b >= i - 1,  as it is stored where 0 < b < i - 1

Scores and sums are made of both forms of every key and value, and each query takes what its position says.
"""

import torch
from torch import Tensor

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, attention_reference, visible_pairs
from hf_kvopt.quant.sealed import seal, unseal
from hf_kvopt.quant.sealed_formats import BlockCodec, SealedKV


def as_sealed(
    states: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
    codec: BlockCodec,
    block_size: int,
) -> Tensor:
    """Return float32 states of which each full block is what its stored form stands for."""
    whole = states.shape[2] // block_size * block_size
    blocks = states[:, :, :whole].unflatten(2, (-1, block_size)).transpose(1, 2).flatten(0, 1)
    read = unseal(seal(blocks, codec), codec, states.shape[3]) if whole else blocks.float()
    read = read.unflatten(0, (len(states), -1)).transpose(1, 2).flatten(2, 3) if whole else states[:, :, :0].float()
    return torch.cat((read, states[:, :, whole:].float()), dim=2)


def reads_sealed(
    positions: Tensor,  # [...] of queries
    num_keys: int,
    block_size: int,
) -> Tensor:
    """Return [..., num_keys] bool: which keys a query reads as they are stored."""
    blocks = torch.arange(num_keys, device=positions.device) // block_size
    return (blocks > 0) & (blocks < (positions // block_size - 1)[..., None])


def sealed_reference(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], the last positions
    k: Tensor,  # [batch, num_kv_heads, kv_len, head_dim] of all tokens, as they came
    v: Tensor,
    sealed: SealedKV,
    block_size: int,
    pattern: Pattern,
    lags: Tensor | None = None,  # [batch] columns before each row's first token
) -> AttentionOut:
    """Attend row by row in float32; a query in a column before its row's first token gives 0."""
    outs, lses = [], []
    q_len, kv_len = q.shape[2], k.shape[2]
    for row in range(len(q)):
        lag = 0 if lags is None else int(lags[row])
        own = slice(row, row + 1)
        keys, values = (x[own, :, lag:] for x in (k, v))
        starts = None if pattern.starts is None else [max(0, int(pattern.starts[row]) - lag)]
        mask = pattern.mask
        if mask is not None:
            mask = mask[own if len(mask) > 1 else slice(None)][..., lag:]
        kv_lens = torch.tensor([kv_len - lag])
        seen = visible_pairs(q_len, kv_lens, kv_len - lag, pattern.is_causal, pattern.window, starts)
        positions = torch.arange(kv_len - lag - q_len, kv_len - lag)
        is_sealed = reads_sealed(positions, kv_len - lag, block_size)
        out, lse = _attend(q[own], keys, values, sealed, block_size, pattern._replace(mask=mask), seen, is_sealed)
        outs.append(out.masked_fill((positions < 0)[None, :, None, None], 0.0))
        lses.append(lse)
    return AttentionOut(torch.cat(outs), torch.cat(lses))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sealed: SealedKV,
    block_size: int,
    pattern: Pattern,
    seen: Tensor,
    is_sealed: Tensor,  # [q_len, kv_len]
) -> tuple[Tensor, Tensor]:
    """One query at a time: its keys and values are those that its position says."""
    stored_k, stored_v = as_sealed(k, sealed.k, block_size), as_sealed(v, sealed.v, block_size)
    outs, lses = [], []
    for i in range(q.shape[2]):
        takes = is_sealed[i][:, None]
        keys, values = torch.where(takes, stored_k, k.float()), torch.where(takes, stored_v, v.float())
        mask = pattern.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, i : i + 1]
        one = attention_reference(
            q[:, :, i : i + 1].float(), keys, values, seen[:, :, i : i + 1], pattern.scale, pattern.softcap,
            pattern.sinks, mask,
        )  # fmt: skip
        assert one.lse is not None
        outs.append(one.out)
        lses.append(one.lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)
