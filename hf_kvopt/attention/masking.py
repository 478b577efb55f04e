"""Brings the forms in which a mask arrives to one: a pattern, and what the pattern cannot say."""

import torch
from torch import Tensor, nn

from hf_kvopt.attention.mask import LazyMask
from hf_kvopt.errors import CacheStateError
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
    """`scoring` with the mask that holds between `query` and `key`, keys cut or refused as eager attention would.

    What a pattern can say of the mask is said so; the rest is a mask [batch | 1, heads | 1, q_len | 1, kv_len].

    Raises:
        ValueError: a mask without four dimensions, or of integers.
        CacheStateError: a mask over fewer keys than the cache hands out.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        return _ordered(scoring, bool(causal), sliding_window if causal else None)
    if isinstance(attention_mask, LazyMask) and attention_mask.sizes[2:] == (q_len, kv_len):
        causal, window = attention_mask.pattern
        if attention_mask.padding is None:
            return _ordered(scoring, causal, window)
        starts = key.starts if isinstance(key, KVHandle) and key.scale is None else None
        if starts is not None and starts == attention_mask.starts:
            return _ordered(scoring, causal, window)  # what the table does not hold needs no mask
        # Pads are skipped row by row in a prefill; for a few queries one mask over the keys is cheaper.
        if q_len > 1 and causal and query.device.type == "cpu" and attention_mask.starts is not None:
            return scoring._replace(is_causal=causal, window=window, starts=attention_mask.starts)
        return scoring._replace(is_causal=causal, window=window, mask=attention_mask.key_mask)
    if attention_mask.dim() != 4:
        raise ValueError(
            "attention_mask must have 4 dimensions [batch, heads, q_len, kv_len] here: got "
            f"{tuple(attention_mask.shape)}; pass a 2D padding mask to the model, not to the attention"
        )
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"a 4D attention_mask must be bool, or float to add to the scores: got {attention_mask.dtype}; convert it, "
            "e.g. attention_mask.bool()"
        )
    if attention_mask.shape[-1] < kv_len:
        raise CacheStateError(
            f"attention_mask covers {attention_mask.shape[-1]} keys: got {kv_len} from the cache; pass a mask over all "
            "cached and new tokens, and give the cache the model's config: PagedCache(config=model.config)"
        )
    if isinstance(attention_mask, LazyMask) and isinstance(key, KVHandle) and attention_mask.shape[-1] != kv_len:
        raise CacheStateError(
            f"this layer of the cache holds {kv_len} tokens: got a mask for {attention_mask.shape[-1]}, as other "
            "layers hold; the cache is out of step, call cache.reset() and pass the whole text"
        )
    is_fixed = isinstance(key, KVHandle) and key.table is None  # columns count from the first one, unlike in a window
    if attention_mask.shape[-1] != kv_len and not is_fixed:
        raise CacheStateError(
            f"attention_mask covers {attention_mask.shape[-1]} keys: got {kv_len}, and nothing says which; pass a mask "
            "over just the keys that each layer reads, or use transformers' own cache where the model made the mask"
        )
    return scoring._replace(is_causal=False, mask=attention_mask[..., :kv_len])


def _ordered(scoring: Pattern, is_causal: bool, window: int | None) -> Pattern:
    # A copy at every layer and step would be a tenth of what attention costs beside its products.
    return scoring if is_causal and window is None else scoring._replace(is_causal=is_causal, window=window)


def hide_before(starts: list[int], pattern: Pattern, kv_len: int) -> Pattern:
    """`pattern` where also no row may look at columns before its first token, which hold nothing."""
    mask = pattern.mask
    if mask is None:
        given = [0] * len(starts) if pattern.starts is None else pattern.starts
        return pattern._replace(starts=[max(pair) for pair in zip(starts, given, strict=True)])
    first = torch.tensor(starts, device=mask.device)
    held = (torch.arange(kv_len, device=mask.device) >= first[:, None])[:, None, None]
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return pattern._replace(mask=torch.where(held, mask, hidden))


def add_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """An additive mask out of a bias on the scores and a mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
