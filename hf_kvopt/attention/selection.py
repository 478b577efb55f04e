"""Selection of blocks for one query a row: each KV head reads those whose keys can score highest; see `eviction.quest`.

bounds of blocks ─► the best of each KV head ─► their keys and values, gathered [batch, num_kv_heads, n, head_dim]
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.handle import KVHandle, view_of


class Selected(NamedTuple):
    """Keys and values that each KV head reads, and who sees which of them."""

    k: Tensor  # [batch, num_kv_heads, n, head_dim]
    v: Tensor  # [batch, num_kv_heads, n, v_head_dim]
    pattern: Pattern


def select_blocks(module: nn.Module, q: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Selected | None:
    """Return what the policy of a cache reads of it for queries [batch, num_heads, 1, head_dim]; None for all."""
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle) or q.shape[2] != 1 or key.table is None:
        return None
    policy, bounds = key.table.policy, None if key.reads is None else key.reads.bounds
    if policy is None or not policy.selects_blocks or bounds is None:
        return None
    tokens = policy.read_tokens(getattr(module, "layer_idx", 0) or 0)
    if tokens is None or key.shape[2] <= tokens:
        return None
    k, v, size = view_of(key), view_of(value), key.table.block_size
    blocks, lens, lags = k.row_tensors()
    group = q.shape[1] // key.shape[1]
    turned = k.for_codes(q)[:, :, 0].float().unflatten(1, (-1, group))  # [batch, num_kv_heads, group, head_dim]
    low, high = (held[blocks.long()].permute(0, 2, 3, 1) for held in (bounds.low, bounds.high))
    scores = (turned.clamp(min=0) @ high + turned.clamp(max=0) @ low) * pattern.scale
    newest = (-(-lens // size) - 1)[:, None]  # of each row
    numbers = torch.arange(blocks.shape[1], device=blocks.device)
    scores = scores.masked_fill((numbers > newest)[:, None, None], -torch.inf).softmax(dim=-1).sum(dim=2)
    scores = scores.masked_fill((numbers > newest)[:, None], -1).masked_fill((numbers == newest)[:, None], torch.inf)
    chosen = scores.topk(min(tokens // size, len(numbers)), dim=-1).indices.sort(dim=-1).values
    places = (chosen[..., None] * size + numbers.new_tensor(range(size))).flatten(2)  # tokens of each row
    slots = blocks.long()[:, None].expand(-1, chosen.shape[1], -1).gather(2, chosen)[..., None] * size
    slots = (slots + numbers.new_tensor(range(size))).flatten(2)
    columns = places - k.skip + (0 if lags is None else lags[:, None, None])
    seen = _mask(columns, places < lens[:, None, None], pattern, group)
    return Selected(
        k.picked(slots), v.picked(slots), pattern._replace(is_causal=False, window=None, starts=None, mask=seen)
    )


def _mask(columns: Tensor, held: Tensor, pattern: Pattern, group: int) -> Tensor:
    """Return the mask [batch, num_heads, 1, n] of columns [batch, num_kv_heads, n], of which some are held."""
    if pattern.starts is not None:
        held = held & (columns >= torch.as_tensor(pattern.starts, device=columns.device)[:, None, None])
    held, columns = (x.repeat_interleave(group, dim=1)[:, :, None] for x in (held, columns))
    if pattern.mask is None:
        return held
    given = pattern.mask.expand(*held.shape[:3], -1)
    given = given.gather(3, columns.clamp(min=0, max=given.shape[3] - 1))
    return given & held if given.dtype == torch.bool else given.masked_fill(~held, torch.finfo(given.dtype).min)
