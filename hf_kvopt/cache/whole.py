"""Wholeness of the forward before this one: it reached all layers of a cache that were ever written, or it did not.

    a whole forward      layers 0 1 2 3 at column 20         4 and 5, which only the config names, were never written
    the next breaks off  layers 0 1     at column 25         the last layer that was ever written, 3, is behind
    seen at              layer 0 of the forward after that   everything goes back to column 20

In the very first forward nobody knows yet which layer is the last: seen at the first layer that was never written while
columns lie behind the others. Layers that do not keep step with the text (cross attention to an image, or layers that
sat out a forward) tell nothing about it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_kvopt.cache.fixed import FixedLayer
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.compat.ranks import is_pipelined
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.pool.fixed_rows import is_on_host


def columns_left(layers: Sequence[Any], layer: PagedLayer, num_tokens: int) -> int | None:
    """Columns that all layers hold where the last forward stopped half way; None where it did not.

    Args:
        layers: those of the cache, in the order in which a forward writes them.
        layer: the one that is about to be written.
        num_tokens: that are about to be written.
    """
    last = _in_step(reversed(layers))
    if last is None:
        return None
    if layer.in_step:
        if layer.is_compileable and not _is_cheap_to_ask(layers, layer, num_tokens):
            return None
        left = _columns(last)
        return left if left < _columns(layer) else None
    if layer.pool is not None:
        return None
    first = _in_step(layers)
    assert first is not None
    # Written by this forward already, with as many tokens, and no layer that was ever written comes behind.
    is_next = first.num_new == num_tokens and _comes_behind(layers, layer, last)
    left = layer.clock
    return left if is_next and left < _columns(first) - num_tokens else None


def refusal(left: int) -> CacheStateError:
    """Say that the last forward stopped half way, and was taken back to `left` columns."""
    return CacheStateError(
        "the last forward stopped half way: got a cache of which only some layers held its tokens; these were taken "
        f"back and {left} are left, so call the model again" + ("" if left else ", with the whole text")
    )


def note_step(layers: Sequence[Any], layer: PagedLayer, num_tokens: int) -> None:
    """Note that `layer` was written."""
    layer.num_new = num_tokens
    first = _in_step(layers) or layer
    layer.in_step = first.num_new == num_tokens and first.clock == layer.clock


def text_columns(layers: Sequence[Any]) -> int:
    """Columns of the text that its layers hold: those of the first one that keeps step, or was written at all."""
    written = (layer for layer in layers if isinstance(layer, PagedLayer) and layer.pool is not None)
    first = _in_step(layers) or next(written, None)
    return 0 if first is None else _columns(first)


def require_undivided_layers(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel for a pipeline: a rank's cache would count the tokens of layers that it never sees.

    Every rank refuses, before the first of them waits for another.
    """
    if is_pipelined(config):
        raise UnsupportedModel(
            f"a cache counts the tokens of all layers: got {type(config).__name__} of a model whose layers are divided "
            "over ranks (DistributedConfig(pp_size=...)); divide each layer, with tp_size, or spread the layers "
            'over the devices of one process with device_map="auto"'
        )


def _in_step(layers: Any) -> PagedLayer | None:
    """The first of the layers that keeps step with the text."""
    for layer in layers:  # asked at each layer of each step: no generator
        if isinstance(layer, PagedLayer) and layer.in_step:
            return layer
    return None


def _columns(layer: PagedLayer) -> int:
    return int(layer.length) if isinstance(layer, FixedLayer) else layer.clock


def _comes_behind(layers: Sequence[Any], layer: PagedLayer, last: PagedLayer) -> bool:
    return next(one for one in layers if one is layer or one is last) is last


def _is_cheap_to_ask(layers: Sequence[Any], layer: PagedLayer, num_tokens: int) -> bool:
    """Return whether the lengths of fixed capacity, which lie on the device, are read without waiting for a step."""
    assert isinstance(layer, FixedLayer)
    return layer is _in_step(layers) and (num_tokens > 1 or is_on_host(layer.length))


def offloads(offloading: bool, only_non_sliding: bool) -> dict[str, bool]:
    """Return the arguments by which transformers' cache moves layers to CPU memory.

    Raises:
        ValueError: there is no device beside the CPU that layers could be moved away from.
    """
    if offloading and not torch.cuda.is_available():
        raise ValueError(
            "offloading keeps layers in CPU memory while they wait for a CUDA device: got offloading=True on a machine "
            "without one; drop it, or keep less with policy=..., a smaller format or enable(..., host_tier=...)"
        )
    return {"offloading": offloading, "offload_only_non_sliding": only_non_sliding}
