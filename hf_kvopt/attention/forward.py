"""The attention function behind `attn_implementation="hf_kvopt"`.

It takes what a model hands to any attention (dense tensors or `KVHandle`s, a mask in one of several forms, and the
model's own extras), brings the mask to a pattern plus what the pattern cannot say, and calls the kernel.
"""

import logging
import weakref
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_kvopt.attention.mask import LazyMask
from hf_kvopt.attention.support import slides
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.kernels.cpu import attend
from hf_kvopt.pool.handle import KVHandle

logger = logging.getLogger(__name__)

_SPARSE = ("indices", "block_indices")


class Masking(NamedTuple):
    """A mask taken apart: what a pattern says, and what it does not."""

    is_causal: bool
    window: int | None
    starts: list[int] | None  # left padding: the first key of each row
    mask: Tensor | None  # [batch | 1, heads | 1, q_len | 1, kv_len] bool or additive


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [batch, num_heads, q_len, head_dim]
    key: Tensor,  # [batch, num_kv_heads, kv_len, head_dim]
    value: Tensor,  # [batch, num_kv_heads, kv_len, v_head_dim]
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over dense keys and values or over a paged cache; never returns attention weights.

    Returns:
        [batch, q_len, num_heads, v_head_dim] contiguous, and None.

    Raises:
        UnsupportedModel: the model hands a sparse selection of keys (`indices`, `block_indices`).
        ValueError: dropout outside of training, or a mask of a shape that has no meaning here.
        CacheStateError: a cache that belongs to another model, or was filled with this very prompt.
    """
    for name in _SPARSE:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} selects keys by `{name}`, which hf_kvopt does not read: load this model with "
                "attn_implementation='eager' or 'sdpa'"
            )
    if dropout and not module.training:
        raise ValueError(
            f"attention dropout must be 0 outside of training: got {dropout}; call model.train() or set it to 0"
        )
    if isinstance(key, KVHandle):
        _check_ownership(module, key, kwargs, attention_mask)
    masking = _take_apart(module, query, key, attention_mask, is_causal, sliding_window)
    if isinstance(key, KVHandle) and key.table is not None and key.table.window is None:
        _check_window(module, attention_mask, sliding_window)
    if position_bias is not None:
        bias = position_bias[..., -key.shape[2] :]
        masking = masking._replace(mask=_add_bias(bias, masking.mask))
    if query.device.type != "cpu":
        _say_sdpa_once(query.device.type)
    sinks = s_aux if s_aux is not None else kwargs.get("sinks")
    out = attend(
        query,
        key.view_dense() if isinstance(key, KVHandle) else key,
        value.view_dense() if isinstance(value, KVHandle) else value,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        is_causal=masking.is_causal,
        window=masking.window,
        softcap=softcap,
        sinks=sinks,
        starts=masking.starts,
        mask=masking.mask,
        dropout=dropout,
    )
    return out, None


def _take_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Masking:
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        return Masking(bool(causal), sliding_window if causal else None, None, None)
    if isinstance(attention_mask, LazyMask) and tuple(attention_mask.shape[2:]) == (q_len, kv_len):
        causal, window = attention_mask.pattern
        if attention_mask.padding is None:
            return Masking(causal, window, None, None)
        # Pads are skipped row by row in a prefill; for a few queries one mask over the keys is cheaper.
        if q_len > 1 and causal and query.device.type == "cpu" and attention_mask.starts is not None:
            return Masking(causal, window, attention_mask.starts, None)
        return Masking(causal, window, None, attention_mask.key_mask)
    if attention_mask.dim() != 4:
        raise ValueError(
            "attention_mask must have 4 dimensions [batch, heads, q_len, kv_len] here: got "
            f"{tuple(attention_mask.shape)}; pass a 2D padding mask to the model, not to the attention"
        )
    if attention_mask.shape[-1] < kv_len:
        raise CacheStateError(
            f"attention_mask covers {attention_mask.shape[-1]} keys: got {kv_len} from the cache; a cache made without "
            "the model's config cannot tell its layers apart here, use PagedCache(config=model.config)"
        )
    return Masking(False, None, None, attention_mask[..., :kv_len])


def _check_window(module: nn.Module, attention_mask: Tensor | None, sliding_window: int | None) -> None:
    """Refuse a layer whose window nobody but the cache keeps, and this cache keeps everything."""
    if sliding_window is not None or (
        isinstance(attention_mask, LazyMask) and attention_mask.pattern.window is not None
    ):
        return
    if not isinstance(attention_mask, LazyMask) and attention_mask is not None:
        return
    config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is not None and layer_idx is not None and slides(config, layer_idx):
        raise UnsupportedModel(
            f"{type(module).__name__} slides by what its cache forgets: got a cache without the model's config, which "
            "forgets nothing; use PagedCache(config=model.config)"
        )


def _add_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _check_ownership(module: nn.Module, handle: KVHandle, kwargs: dict[str, Any], mask: Tensor | None) -> None:
    """Catch a cache that another model filled, and a prompt that is fed on top of itself."""
    if not handle.is_fresh or handle.plane is None or torch.compiler.is_compiling():
        return
    # Only the first reader of an update owns the layer: models with shared KV hand the same tensor on.
    handle.is_fresh = False
    owner = handle.plane.owner() if handle.plane.owner is not None else None
    if owner is None:
        handle.plane.owner = weakref.ref(module)
    elif owner is not module:
        raise CacheStateError(
            f"this cache was filled by another model ({type(owner).__name__} at another place): got "
            f"{type(module).__name__}; use one cache a model, or cache.free() before handing it on"
        )
    _check_positions(handle, kwargs.get("position_ids"), mask)


def _check_positions(handle: KVHandle, position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """A first position before the end of what is cached means that cached tokens came again."""
    table, plane = handle.table, handle.plane
    if table is None or plane is None or not plane.is_first or position_ids is None or position_ids.dim() != 2:
        return
    q_len = position_ids.shape[1]
    past = table.max_length - q_len
    if q_len == 1 or past <= 0:
        return
    # Left padding shifts positions back by as much; behind a window it is known only up to the window's start.
    starts = attention_mask.starts if isinstance(attention_mask, LazyMask) else [0]
    if starts is not None and int(position_ids[:, 0].max()) < past - table.base - handle.skip - max(starts):
        raise CacheStateError(
            f"{q_len} tokens from position {int(position_ids[:, 0].max())} on were fed to a cache that already holds "
            f"{past}: got a cache that is not shorter than the prompt, which transformers then feeds again; call "
            "cache.reset(), or cache.crop(-n) so that at least the last prompt token is missing"
        )


@cache
def _say_sdpa_once(device: str) -> None:
    logger.warning(
        "hf_kvopt attention runs through PyTorch's SDPA on %s: its Triton kernels do not cover it yet", device
    )
