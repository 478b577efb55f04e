"""Checks that turn a silent wrong token into an error, on facts that only the attention function sees."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvopt.attention.mask import LazyMask, Pattern
from hf_kvopt.compat import slides
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.pool.handle import KVHandle, view_of


def check_weights(are_wanted: object) -> None:
    """Refuse `output_attentions=True`, which would otherwise return a tuple of nothing."""
    if are_wanted:
        raise ValueError(
            "hf_kvopt's attention never forms the weights of all keys: got output_attentions=True; drop it, or load "
            "the model with attn_implementation='eager' and call enable(model, attention=False)"
        )


def check_ownership(module: nn.Module, handle: KVHandle, kwargs: dict[str, Any], mask: Tensor | None) -> None:
    """Refuse a cache that another model filled, and a prompt that is fed to a cache that already holds it."""
    reads = handle.reads
    if not handle.is_fresh or reads is None or torch.compiler.is_compiling():
        return
    # Only the first reader of an update owns the layer: models with shared KV pass the same tensor on.
    handle.is_fresh = False
    owner = reads.owner() if reads.owner is not None else None
    if owner is None or (owner is not module and handle.is_all_new):
        reads.owner = weakref.ref(module)
    elif owner is not module:
        raise CacheStateError(
            f"this cache was filled by another model ({type(owner).__name__} at another place): got "
            f"{type(module).__name__}; use one cache a model, or cache.free() before handing it on"
        )
    if reads.is_first:
        _check_positions(handle, kwargs.get("position_ids"), mask)


def _check_positions(handle: KVHandle, position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse a first position before the end of the cache: cached tokens were fed again."""
    table = handle.table
    if table is None or position_ids is None or position_ids.dim() != 2:
        return
    q_len = position_ids.shape[1]
    past = table.clock - q_len
    if q_len == 1 or past <= 0:
        return
    # Left padding shifts positions back by its length; with a window it is known only up to the window's start. A dense
    # mask does not tell where rows start.
    starts = attention_mask.starts if isinstance(attention_mask, LazyMask) else None
    starts = [0] if attention_mask is None else starts
    if starts is not None and int(position_ids[:, 0].max()) < past - table.base - view_of(handle).skip - max(starts):
        raise CacheStateError(
            f"{q_len} tokens from position {int(position_ids[:, 0].max())} on were fed to a cache that already holds "
            f"{past}: got a cache that is not shorter than the prompt, which transformers then feeds again; call "
            "cache.reset(), or cache.crop(-n) so that at least the last prompt token is missing"
        )


def check_window(
    module: nn.Module, handle: KVHandle, attention_mask: Tensor | None, sliding_window: int | None
) -> None:
    """Refuse a layer whose window only the cache enforces, if this cache keeps everything."""
    reads = handle.reads
    if reads is None or handle.table is None or handle.table.window is not None:
        return
    if reads.slides is None:
        # Once for each layer: reading a config at every step costs more than the attention of a short context.
        config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
        reads.slides = config is not None and layer_idx is not None and slides(config, layer_idx)
    if not reads.slides or sliding_window is not None:
        return
    # A full pattern is cross attention, whose layer has the number of a layer of self-attention.
    if isinstance(attention_mask, LazyMask) and attention_mask.pattern != Pattern(is_causal=True, window=None):
        return
    if isinstance(attention_mask, LazyMask) or attention_mask is None:
        raise UnsupportedModel(
            f"{type(module).__name__} slides by what its cache forgets: got a cache without the model's config, which "
            "forgets nothing; use PagedCache(config=model.config)"
        )
