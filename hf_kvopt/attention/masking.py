"""Conversion of attention masks in any form to a pattern, and a mask for what the pattern cannot express."""

import torch
from torch import Tensor, nn

from hf_kvopt.attention.mask import LazyMask
from hf_kvopt.errors import CacheStateError
from hf_kvopt.kernels import devices
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.handle import KVHandle


def take_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    scoring: Pattern,
) -> Pattern:
    """Return `scoring` with the mask between `query` and `key`; masks that eager attention cannot add are refused.

    Whatever a pattern can express becomes part of it; the rest is a mask [batch | 1, heads | 1, q_len | 1, kv_len].

    Raises:
        ValueError: a mask of another shape than the scores, or of integers.
        CacheStateError: the mask covers fewer or more keys than the cache returns.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        return _ordered(scoring, bool(causal), sliding_window if causal else None)
    if isinstance(attention_mask, LazyMask) and attention_mask.sizes[2:] == (q_len, kv_len):
        causal, window = attention_mask.pattern
        if attention_mask.padding is None:
            # A copy at every layer and step would be a tenth of what attention costs beside its products.
            return scoring if causal and window is None else scoring._replace(is_causal=causal, window=window)
        # Where the mask's rows begin is known to the device alone: a decode step must not wait to be told, a prompt
        # looks once for all layers.
        is_host = devices.is_on_host(query)
        may_ask = q_len > 1 or is_host
        held = key.starts if may_ask and isinstance(key, KVHandle) and key.scale is None else None
        if held is not None and held == attention_mask.starts:
            return _ordered(scoring, causal, window)  # columns that the table does not hold need no mask
        # In a prefill, padding is skipped row by row; for a few queries one mask over the keys is cheaper.
        if q_len > 1 and causal and attention_mask.starts is not None:
            if not any(attention_mask.starts):
                return _ordered(scoring, causal, window)  # on a device a mask without padding is passed on, too
            starts = attention_mask.starts if is_host else attention_mask.device_starts
            return scoring._replace(is_causal=causal, window=window, starts=starts)
        return scoring._replace(is_causal=causal, window=window, mask=attention_mask.key_mask)
    if isinstance(key, KVHandle) and key.table is None and attention_mask.shape[-1] > kv_len:
        attention_mask = attention_mask[..., :kv_len]  # fixed capacity: columns count from the first one
    _check_mask(query, key, attention_mask)
    return scoring._replace(is_causal=False, mask=attention_mask)


def select_keys(mask: Tensor | None, indices: Tensor, q_len: int, kv_len: int) -> Tensor:
    """Return `mask` with each query limited to the keys that the model selected for it.

    Args:
        indices: [batch, q_len, selected], as passed by DeepSeek's sparse attention, whose eager and sdpa versions
            make the same mask of them.
    """
    seen = torch.zeros(*indices.shape[:2], kv_len, dtype=torch.bool, device=indices.device)
    seen = seen.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        return seen.tril(kv_len - q_len)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _check_mask(query: Tensor, key: Tensor, mask: Tensor) -> None:
    """Refuse a dense mask whose shape does not cover every query and key."""
    batch, num_heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    if mask.dim() != 4:
        raise ValueError(
            "attention_mask must have 4 dimensions [batch, heads, q_len, kv_len] here: got "
            f"{tuple(mask.shape)}; pass a 2D padding mask to the model, not to the attention"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"a 4D attention_mask must be bool, or float to add to the scores: got {mask.dtype}; convert it, "
            "e.g. attention_mask.bool()"
        )
    if isinstance(mask, LazyMask) and isinstance(key, KVHandle) and mask.shape[-1] > kv_len:
        raise CacheStateError(
            f"this layer of the cache holds {kv_len} tokens: got a mask for {mask.shape[-1]}, as other layers hold; "
            "the cache is out of step, call cache.reset() and pass the whole text"
        )
    if mask.shape[-1] != kv_len:
        raise CacheStateError(
            f"attention_mask covers {mask.shape[-1]} keys: got {kv_len} from the cache; pass a mask over all that this "
            "layer hands out, as cache.get_mask_sizes(q_len, layer_idx) says (a window of them where the layer slides, "
            "the whole capacity where it is fixed), and give the cache the model's config: "
            "PagedCache(config=model.config)"
        )
    allowed = zip(mask.shape[:3], (batch, num_heads, q_len), strict=True)
    if any(size not in (1, full) for size, full in allowed):
        raise ValueError(
            f"a 4D attention_mask is [batch, heads, q_len, kv_len] or 1 in place of the first three: got "
            f"{list(mask.shape)} for {[batch, num_heads, q_len, kv_len]}; pass one over these queries alone"
        )


def _ordered(scoring: Pattern, is_causal: bool, window: int | None) -> Pattern:
    return scoring._replace(is_causal=is_causal, window=window)


def hide_before(key: KVHandle, pattern: Pattern, kv_len: int) -> Pattern:
    """Hide in `pattern` the columns of `key` before each row's first token, which hold nothing."""
    mask, starts, given = pattern.mask, key.starts or [], pattern.starts
    assert key.table is not None
    if mask is None:
        if isinstance(given, Tensor):
            return pattern._replace(starts=given.maximum(key.table.numbers(starts, given.device)))
        given = [0] * len(starts) if given is None else given
        return pattern._replace(starts=[max(pair) for pair in zip(starts, given, strict=True)])
    first = key.table.numbers(starts, mask.device)
    held = (torch.arange(kv_len, device=mask.device) >= first[:, None])[:, None, None]
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return pattern._replace(mask=torch.where(held, mask, hidden))


def add_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Combine a bias on the scores and a mask into an additive mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
