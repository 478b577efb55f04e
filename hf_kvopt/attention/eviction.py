"""Tells a table that evicts where its rows begin, and refuses masks that would be read in the wrong place.

    mask over the text     0 0 1 1 1 1 1 1 1 1       columns handed out    . . . 0 1 2 . . 7 8 9  (of a row)
                           ^^^ padding                                      what the table holds

A mask speaks of columns of the text; behind a hole the columns that are handed out are others. Padding on the left is
all that can be carried over: the table holds none of it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvopt import compat
from hf_kvopt.attention.mask import LazyMask, Pattern
from hf_kvopt.attention.rotary import turn
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.eviction.policy import EvictionPolicy, PromptStates
from hf_kvopt.kernels.sealed_view import SealedView
from hf_kvopt.pool.handle import KVHandle, view_of


def check_eviction(
    module: nn.Module, handle: KVHandle, mask: Tensor | None, position_bias: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Let the table of `handle` know the padding of its rows, where it has a policy; once a forward.

    Raises:
        UnsupportedModel: scores depend on where a key stands in the text by more than its rotation.
        CacheStateError: a mask that hides more than padding on the left, or one made by hand over dropped tokens.
    """
    table, reads = handle.table, handle.reads
    if table is None or table.policy is None or reads is None or not reads.is_first:
        return
    if position_bias is not None or kwargs.get("indices") is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} weighs or selects keys by their place in the text: got a cache with "
            f"{table.policy}, which closes gaps; use the cache without a policy"
        )
    if (table.policy.scores_prompts or table.policy.selects_blocks) and hasattr(module, compat.EXPAND_KV):
        raise UnsupportedModel(
            f"{table.policy} scores keys by head: got {type(module).__name__}, whose heads share one latent; use "
            "SinkRecent, or the cache without a policy"
        )
    if isinstance(mask, LazyMask) and mask.pattern != Pattern(is_causal=True, window=None):
        raise CacheStateError(
            f"a cache with {table.policy} takes causal attention over the whole text here: got {mask.pattern}; where "
            "the model has sliding layers, give the cache its config: PagedCache(model.config, policy=...)"
        )
    if isinstance(mask, LazyMask) and mask.sizes[3] != handle.shape[2]:
        return  # made for a layer that holds another number of tokens; see `mask_of_layer`
    is_step = 0 < table.step_start == table.clock - 1
    if is_step and handle.device.type != "cpu" and isinstance(mask, LazyMask):
        return  # the mask of a decode step grows by a column that is seen: no reason to wait for the device
    table.note_padding(_hidden(handle, mask))


def mask_of_layer(handle: KVHandle, mask: Tensor | None) -> Tensor | None:
    """Return `mask` over the columns that `handle` hands out, where it was made for those of another layer.

    Layers whose policies differ hold unlike many tokens, and transformers makes one mask for all. What is hidden is
    padding, which the table of each layer knows.
    """
    table, kv_len = handle.table, handle.shape[2]
    if table is None or table.policy is None or not table.policy.by_layer:
        return mask
    if not isinstance(mask, LazyMask) or mask.sizes[3] == kv_len:
        return mask
    firsts = [lag + pads for lag, pads in zip(table.lags, table.padding(), strict=True)]
    padding = None
    if any(firsts):
        padding = torch.arange(kv_len, device=handle.device) >= table.numbers(firsts, handle.device)[:, None]
    sizes = (*mask.sizes[:3], kv_len)

    def dense() -> Tensor:
        seen = torch.ones(sizes[2:], dtype=torch.bool, device=handle.device).tril(kv_len - sizes[2])
        whole = seen.expand(sizes)
        return whole if padding is None else whole & padding[:, None, None]

    return LazyMask(sizes, handle.device, mask.pattern, padding, dense)


def choose_prompt(module: nn.Module, q: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Let the policy of a table choose what each KV head of this layer keeps of a prompt, once it was read.

    Args:
        module: the attention module.
        q: [batch, num_heads, q_len, head_dim].
        key: what the cache handed out for keys; nothing happens where its table scores no prompts.
        value: likewise for values.
        scale: of the softmax.
    """
    if not isinstance(key, KVHandle) or not isinstance(value, KVHandle):
        return
    table, reads = key.table, key.reads
    if table is None or table.policy is None or not table.policy.scores_prompts or reads is None:
        return
    if q.shape[2] < 2 or table.has_chosen(reads):
        return
    # Columns before a row's first token: noted padding, or none where rows begin behind it.
    padding = [pads + lag for pads, lag in zip(table.padding(), table.lags, strict=True)]
    policy, rows, held = table.policy, [], key.shape[2]
    spans = [table.to_shrink(row, held - pads) for row, pads in enumerate(padding)]
    if all(policy.budget(len(span)) == len(span) for span in spans):
        return
    k, v = view_of(key), view_of(value)
    keys, values = k.dense(), v.dense()
    for row, (pads, span) in enumerate(zip(padding, spans, strict=True)):
        own_q, own_k, own_v = (
            q[row, :, max(0, pads - (held - q.shape[2])) :],
            keys[row, :, pads:],
            values[row, :, pads:],
        )
        prompt = PromptStates(own_q, own_k, own_v, scale, partial(turn, module), module, row, pads)
        rows.append(_chosen(policy, prompt, span))
    states = None
    if isinstance(k, SealedView) and isinstance(v, SealedView):
        came = (k.arrived, v.arrived)
        states = [tuple(_picked(x, i, rows[i] + pads) for x in came) for i, pads in enumerate(padding)]
    table.choose(reads, rows, states)  # type: ignore[arg-type]


def _chosen(policy: EvictionPolicy, states: PromptStates, span: range) -> Tensor:  # [num_kv_heads, count]
    """Return the tokens that each KV head keeps of a row, ascending: those outside of `span`, and the best inside."""
    tokens = torch.arange(states.k.shape[1], device=states.k.device).expand(len(states.k), -1)
    count = policy.budget(len(span))
    if count == len(span):
        return tokens
    best = policy.score_states(states)[:, span.start : span.stop].topk(count, dim=-1).indices + span.start
    return torch.cat([tokens[:, : span.start], best.sort(dim=-1).values, tokens[:, span.stop :]], dim=1)


def _picked(states: Tensor | None, row: int, columns: Tensor) -> Tensor:
    """Return [num_kv_heads, count, head_dim] of states [batch, num_kv_heads, columns, head_dim] by columns of heads."""
    assert states is not None
    return states[row].gather(1, columns[..., None].expand(-1, -1, states.shape[3]))


def _hidden(handle: KVHandle, mask: Tensor | None) -> list[int]:
    """Leading columns of each row, among those handed out, that no query sees."""
    batch = handle.shape[0]
    table = handle.table
    assert table is not None
    if mask is None or (isinstance(mask, LazyMask) and mask.padding is None):
        return [0] * batch
    if isinstance(mask, LazyMask):
        seen = mask.padding
        assert seen is not None
    elif table.base:
        raise CacheStateError(
            f"a mask made by hand speaks of columns of the text: got one of shape {list(mask.shape)} for a cache whose "
            f"{table.policy} dropped some of them; pass a padding mask [batch, columns], or none"
        )
    else:
        return _padding_of(mask, batch)
    hidden = (~seen).int().cumprod(dim=-1).sum(dim=-1)
    is_left = (torch.arange(seen.shape[1], device=seen.device) >= hidden[:, None]).eq(seen).all()
    if not bool(is_left):
        raise CacheStateError(
            f"a cache with {table.policy} takes rows that are padded on the left alone: got an attention_mask with "
            "zeros behind a token; pad on the left (tokenizer.padding_side = 'left'), or use the cache without a policy"
        )
    counts: list[int] = hidden.tolist()
    return counts


def _padding_of(mask: Tensor, batch: int) -> list[int]:
    """The greatest number of leading columns of each row that no query behind them sees; padding may see itself.

    Args:
        mask: [batch | 1, heads | 1, q_len, kv_len] bool, or float to add, over the last q_len of kv_len columns.
        batch: rows.
    """
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(dim=1)
    q_len, kv_len = seen.shape[1:]
    first = torch.where(seen.any(dim=-1), seen.int().argmax(dim=-1), kv_len)  # [rows, q_len]
    least = first.flip(-1).cummin(dim=-1).values.flip(-1)  # that this query or a later one sees
    places = torch.arange(kv_len - q_len, kv_len, device=seen.device)
    behind = torch.where(least >= places, places, -1).amax(dim=-1)
    counts: list[int] = behind.maximum(least[:, 0].clamp(max=kv_len - q_len)).expand(batch).tolist()
    return counts
