"""Facts of transformers' configs and cache layers that depend on its version: kinds of layers, loops, ropes."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils

from hf_kvopt.compat.names import _cache_keyword, find

_LONGROPES = ("longrope", "su")  # one scaling; "su" in older configs
WITHOUT_KV = ("conv", "linear_attention", "dummy")
"""Kinds of layers without keys and values: states instead, or those of another layer."""
STATE_WRITES = frozenset({"update_conv_state", "update_recurrent_state"})
"""Methods of a cache by which a module writes states; a module that has none names neither."""
FORGETFUL = ("jamba", "zamba")
"""Model types whose layers with states forget these where they read several tokens at once (Mamba 1)."""
_STATES_IN_MODULES = ("recurrent_gemma",)  # model types whose states lie in the modules and not in a cache
_layer_types_and_kwargs = find(cache_utils, "get_layer_types_and_kwargs")


def unwrapped(model: Any) -> Any:
    """Return the transformers model that PEFT's wrapper holds, whose methods it calls; anything else as it is."""
    inner = None if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def uses_standard_cache(kind: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Return whether generate() makes a standard cache for models of class `kind`, their forward takes it, and some
    layer fills it with keys and values."""
    supports: Any = getattr(kind, "_supports_default_dynamic_cache")  # noqa: B009
    return _cache_keyword(kind.forward) is not None and bool(supports()) and _keeps_keys_and_values(config)


def _keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    try:
        kinds, _ = layer_types(config.get_text_config(decoder=True))
    except (AttributeError, TypeError, ValueError):
        return False  # transformers makes no cache from it either: it cannot tell what its layers are
    return not set(kinds) <= set(WITHOUT_KV)


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the kind of every cache layer of a decoder's `config`, and the options of its layer class."""
    kinds, options = _layer_types_and_kwargs(config)
    # One set of options for all layers before 5.19's successor of the same name.
    options = [options] * len(kinds) if isinstance(options, dict) else list(options)
    return list(kinds), options


def appended_layers(config: PreTrainedConfig) -> list[int]:
    """Return the numbers of the cache layers of which a model appends copies, in order: one for each later pass.

    A decoder that passes through some of its layers several times keeps keys and values of each pass, and tells by the
    code of its first forward which. Where that is not known here, sharing prefixes is refused at the first hit.
    """
    if getattr(config, "recurrent_kv_cache_mode", None) == "per_loop":  # Dory
        start, count, passes = config.n_input_layers, config.n_recurrent_layers, config.n_recurrent_loops
    elif getattr(config, "loop_num_passes", None) is not None:  # Inkling 2 loop
        start, passes = config.loop_layer_index_start, config.loop_num_passes
        count = config.loop_layer_index_end - start
    else:
        return []
    return [*range(start, start + count)] * (passes - 1)


def stock_layer(kind: str, options: dict[str, Any]) -> Any:
    """Make transformers' own cache layer of a kind."""
    return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)


def holds_states(kind: str) -> bool:
    """Return whether cache layers of a kind hold convolution or recurrent states, alone or beside keys and values."""
    made = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
    return made is not None and issubclass(made, cache_utils.LinearAttentionCacheLayerMixin)


def holds_nothing(layer: object) -> bool:
    """Return whether a cache layer stands for one that reads another's keys and values, or has no attention."""
    kind = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.get("dummy")  # older versions leave such layers out
    return kind is not None and isinstance(layer, kind)


def keeps_states_in_modules(config: PreTrainedConfig) -> bool:
    """Return whether a decoder's modules keep states themselves, so that no cache says what text these are of."""
    return config.model_type in _STATES_IN_MODULES


def slides(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Return whether transformers' cache would slide at this layer."""
    if not getattr(config, "is_heterogeneous", True) and getattr(config, "sliding_window", None) is None:
        return False  # without reading the types of all layers, which takes longer than a short attention
    kinds, _ = layer_types(config)
    return layer_idx < len(kinds) and kinds[layer_idx] == "sliding_attention"


def is_chunked(module: torch.nn.Module) -> bool:
    """Return whether an attention module attends within chunks of the text: its config names its layer so."""
    config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is None or layer_idx is None or getattr(config, "attention_chunk_size", None) is None:
        return False
    kinds, _ = layer_types(config)
    return layer_idx < len(kinds) and kinds[layer_idx] == "chunked_attention"


def length_dependent_rope(config: PreTrainedConfig) -> dict[str, int]:
    """Return the rotary scalings of a decoder by which a token's keys depend on the length of the whole text.

    Each with the length up to which they do not: `dynamic` leaves texts within `max_position_embeddings` alone,
    `longrope` rotates by another set of factors from one token beyond the original length on. 0 where none is named.
    """
    longest = getattr(config, "max_position_embeddings", None) or 0
    # Models that compute their past anew where they pass it (Phi-3) ask for this one.
    original = getattr(config, "original_max_position_embeddings", None)
    found: dict[str, int] = {}
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None) or {}
        # One set of parameters, or one for each kind of layer.
        for part in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
            for kind in {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)}:
                if "dynamic" in kind:
                    found[kind] = longest
                elif kind in _LONGROPES:
                    named = [n for n in (part.get("original_max_position_embeddings"), original) if n]
                    found[kind] = min(named, default=0)
    return found
