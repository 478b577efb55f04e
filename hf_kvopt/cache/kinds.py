"""Which cache layer holds which kind of model layer."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionLayer, get_layer_types_and_kwargs

from hf_kvopt.cache.fixed import FixedLayer
from hf_kvopt.cache.hybrid import HybridLayer
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.pool.block_table import BlockTable

logger = logging.getLogger(__name__)

TableFor = Callable[[int | None], BlockTable]

_WINDOWED = ("sliding_attention", "chunked_attention")
_HYBRID = ("hybrid", "hybrid_sliding")
_WITHOUT_KV = ("conv", "linear_attention", "dummy")


def layers_for(config: PreTrainedConfig, table_for: TableFor, compileable: bool) -> list[Any]:
    """One cache layer for each layer of the decoder that `config` describes.

    Args:
        config: the model's config, or that of its decoder.
        table_for: gives the table that all layers with a window (or None) share.
        compileable: fixed capacity instead of growing layers.
    """
    kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [_layer_for(kind, kwargs, table_for, compileable) for kind, kwargs in zip(kinds, options, strict=True)]


def attention_layer(window: int | None, table_for: TableFor, compileable: bool) -> PagedLayer:
    """A layer that holds keys and values only."""
    return FixedLayer(table_for(None)) if compileable else PagedLayer(table_for(window))


def _layer_for(kind: str, options: dict[str, Any], table_for: TableFor, compileable: bool) -> Any:
    if kind == "full_attention":
        return attention_layer(None, table_for, compileable)
    if kind in _WINDOWED:
        return attention_layer(options["sliding_window"], table_for, compileable)
    if kind in _HYBRID and not compileable:
        states = LinearAttentionLayer(number_of_states=options.get("number_of_states", 1))
        return HybridLayer(table_for(options.get("sliding_window")), states)
    # Recurrent states, indexers and compressed keys have no blocks: transformers' own layers keep them.
    if kind not in _WITHOUT_KV:
        _say_once(kind)
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)


@functools.cache
def _say_once(kind: str) -> None:
    logger.warning("layers of kind %r keep transformers' own storage in a paged cache: right, but not in blocks", kind)
