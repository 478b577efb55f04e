"""Attention over a layer whose heads hold unlike many tokens: kind by kind, each over what its own heads hold."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_kvopt.attention.packed import Attend
from hf_kvopt.pool.headwise import HeadwiseKV

_BY_HEAD = ("s_aux", "sinks")  # [num_heads], where a model passes them


def attend_headwise(
    attend: Attend,  # attention over one cache: see `attention_forward`
    module: nn.Module,
    query: Tensor,  # [batch, num_heads, q_len, head_dim]
    key: HeadwiseKV,
    value: HeadwiseKV,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with the query heads of each kind of KV head to what these hold.

    Returns:
        [batch, q_len, num_heads, v_head_dim], and None.
    """
    outs, heads = [], key.query_heads(query.shape[1] // key.shape[1])
    for own, keys, values in zip(heads, key.parts, value.parts, strict=True):
        has_heads = attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[1] > 1
        mask = attention_mask.index_select(1, own) if has_heads and attention_mask is not None else attention_mask
        given = {name: kwargs[name].index_select(-1, own) for name in _BY_HEAD if kwargs.get(name) is not None}
        outs.append(attend(module, query.index_select(1, own), keys, values, mask, **{**kwargs, **given})[0])
    return torch.cat(outs, dim=2).index_select(2, torch.cat(heads).argsort()), None
