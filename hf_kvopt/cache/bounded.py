"""Refuses, when a cache with an eviction policy is made, what such a cache is not for."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_kvopt.cache.hybrid import HybridLayer
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.eviction.policy import EvictionPolicy


def checked_policy(policy: object, config: CacheConfig, model: PreTrainedConfig | None) -> EvictionPolicy | None:
    """Return `policy`, which may be None, where a cache of `config` can give blocks back as it says.

    Raises:
        TypeError: something else than a policy.
        ValueError: a cache of fixed capacity, blocks that the policy cannot work with, or a policy that goes by layers
            where the config of the model, which says how many there are, is not given.
    """
    if policy is None:
        return None
    if not isinstance(policy, EvictionPolicy):
        raise TypeError(
            f"policy must be an eviction policy such as hf_kvopt.SinkRecent(sinks=4, recent=1024): got {policy!r}"
        )
    if config.compileable:
        raise ValueError(
            f"a cache of fixed capacity gives no block back: got compileable=True and policy={policy}; drop one"
        )
    if policy.by_layer and model is None:
        raise ValueError(
            f"{policy} gives each layer a budget of its own: got a cache without the model's config, which says how "
            "many layers there are; pass PagedCache(model.config, policy=...)"
        )
    policy.check(config.block_size)
    return policy


def require_decoder(policy: EvictionPolicy | None, config: PreTrainedConfig, layers: list[Any]) -> list[Any]:
    """Return `layers`; raise UnsupportedModel where a model keeps more of a text than keys and values of its tokens.

    Args:
        policy: of the cache; nothing is refused where it has none.
        config: of the whole model, or of its decoder.
        layers: that a cache makes for it.
    """
    if policy is None:
        return layers
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"eviction policies are for decoders: got {policy} for the encoder-decoder {type(config).__name__}, whose "
            "positions count what the cache hands out; use the cache without a policy"
        )
    states = [layer for layer in layers if _has_states(layer)]
    if states:
        raise UnsupportedModel(
            f"eviction policies are for models whose layers hold keys and values alone: got {policy} for a "
            f"{type(config).__name__} with {len(states)} layers that hold states or keys of an indexer, which "
            "sum up or point at dropped tokens; use the cache without a policy"
        )
    if not any(getattr(layer, "table", None) is not None and layer.table.policy is not None for layer in layers):
        raise UnsupportedModel(
            f"eviction policies act on layers of full attention: got {policy} for a {type(config).__name__} that has "
            "none, so that its windows bound the memory already; use the cache without a policy"
        )
    return layers


def require_alone(policy: object, model: str, attention: bool, beside: Mapping[str, bool]) -> None:
    """Refuse a policy beside what reads or keeps the tokens that it drops.

    Args:
        policy: of the cache; nothing is refused where it has none.
        model: its class, for the error.
        attention: whether the model runs with hf_kvopt's attention.
        beside: options of `enable` that need all tokens, and whether each was given.

    Raises:
        UnsupportedModel: the model's own attention.
        ValueError: an option that needs all tokens.
    """
    if policy is None:
        return
    if not attention:
        raise UnsupportedModel(
            f"a cache with {policy} needs hf_kvopt's attention, which alone knows where its gaps are: got {model} with "
            "its own; drop attention=False if it was given, or the policy"
        )
    for name in (name for name, is_given in beside.items() if is_given):
        raise ValueError(
            f"{name} needs all tokens of a text: got {name} together with policy={policy}, which drops some; drop one"
        )


def forbid(policy: EvictionPolicy | None, what: str) -> None:
    """Raise CacheStateError for an operation that a cache with a policy does not have."""
    if policy is not None:
        raise CacheStateError(
            f"{what}: got a cache with {policy}, which would drop other tokens than one by one; use the cache without "
            "a policy"
        )


def _has_states(layer: Any) -> bool:
    is_stock = not hasattr(layer, "table") and not getattr(layer, "is_dummy", False)
    return is_stock or isinstance(layer, HybridLayer)
