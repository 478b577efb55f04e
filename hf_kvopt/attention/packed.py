"""Attention of a packed forward: cut by cut, each over the cache of its own rows.

A packed text has no mask of its own: of the mask that the model made over its tokens, only the pattern counts (causal,
window, chunks), and it holds between the tokens of each row and what the row's cache holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvopt.attention.mask import LazyMask, Pattern
from hf_kvopt.attention.mla import LatentKV
from hf_kvopt.compat import is_chunked
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.pool.handle import KVHandle, view_of
from hf_kvopt.pool.packed import PackedKV

Attend = Callable[..., tuple[Tensor, None]]


def attend_packed(
    attend: Attend,  # attention over one cache: see `attention_forward`
    module: nn.Module,
    query: Tensor,  # [1, num_heads, tokens, head_dim]
    key: PackedKV,
    value: PackedKV,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each token to what its own row holds.

    Returns:
        [1, tokens, num_heads, v_head_dim], and None.

    Raises:
        UnsupportedModel: a mask that says more than causal, a window or chunks.
    """
    pattern = _pattern(module, attention_mask, kwargs)
    kwargs |= {"is_causal": pattern.is_causal, "sliding_window": pattern.window}
    kwargs.pop("position_ids", None)  # of all rows: nothing is told by the first and the last of them
    outs = []
    for cut, keys, values in zip(key.cuts, key.parts, value.parts, strict=True):
        queries = cut.rows_of(query)
        mask = _chunk_mask(keys, cut.q_len) if is_chunked(module) else None
        outs.append(cut.packed(attend(module, queries, keys, values, mask, **kwargs)[0]))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), None


def _pattern(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> Pattern:
    """Who attends to whom within a row."""
    if isinstance(mask, LazyMask) and mask.padding is None and mask.pattern.is_causal:
        return mask.pattern
    if is_chunked(module):
        return Pattern(is_causal=True, window=None)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and is_causal:
        return Pattern(is_causal=True, window=kwargs.get("sliding_window"))
    raise UnsupportedModel(
        f"{type(module).__name__} attends by a mask that is neither causal, nor a window, nor chunks: got it for a "
        "packed batch, whose rows it says nothing of; generate with model.generate and a PagedCache"
    )


def _chunk_mask(keys: Tensor, q_len: int) -> Tensor:
    """Make a mask [rows, 1, q_len, kv_len] bool by which each query sees the tokens of its own chunk, up to itself."""
    handle = keys.latent if isinstance(keys, LatentKV) else keys
    assert isinstance(handle, KVHandle)
    table, kv_len = handle.table, handle.shape[2]
    assert table is not None
    assert table.window is not None
    lags = torch.tensor(table.lags, device=handle.device)[:, None]
    tokens = (
        torch.arange(kv_len, device=handle.device) + table.base + view_of(handle).skip - lags
    )  # their numbers in the row
    queries = tokens[:, -q_len:, None]
    seen = (tokens[:, None] >= 0) & (tokens[:, None] <= queries)
    seen &= tokens[:, None] // table.window == queries // table.window
    return seen[:, None]
