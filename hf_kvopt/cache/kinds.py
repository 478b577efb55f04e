"""Which cache layer holds which kind of model layer, and in which format."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from hf_kvopt import compat
from hf_kvopt.cache.headwise import HeadwiseLayer
from hf_kvopt.cache.hybrid import HybridLayer
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.cache.rows import GrowingRows
from hf_kvopt.cache.states import StateLayer
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.eviction.policy import EvictionPolicy, HeadPolicies
from hf_kvopt.quant import LATENTS, FormatPolicy, KVFormat, require_unsealed

logger = logging.getLogger(__name__)

_WINDOWED = ("sliding_attention", "chunked_attention")
_HYBRID = ("hybrid", "hybrid_sliding")
LayerPolicy = EvictionPolicy | HeadPolicies | None


class LayerMaker(NamedTuple):
    """Makes the layers of a cache, of what all of them have in common."""

    rows: GrowingRows  # gives the table that all layers with a window (or None) share
    formats: FormatPolicy
    policy: EvictionPolicy | None = None  # of layers without a window

    def attention(self, window: int | None, format: KVFormat, policy: LayerPolicy = None) -> PagedLayer:
        """A layer that holds keys and values only, with a policy of its own or that of all."""
        if isinstance(policy, HeadPolicies):
            others = self.attention(None, format, policy.others)
            whole = self.rows.table_for(None, policy.own)
            exact = self.formats.exact_prefill
            return HeadwiseLayer(whole, others, policy.heads, format, exact) if policy.heads else others
        return self.rows.make_layer(window, policy, format, self.formats.exact_prefill)

    def layer(
        self, kind: str, options: dict[str, Any], layer_idx: int, is_latent: bool, policy: LayerPolicy = None
    ) -> Any:
        """A layer of a kind that `is_paged`."""
        window = options.get("sliding_window")
        format = self.formats.at(layer_idx, is_sliding=window is not None)
        if is_latent:
            if isinstance(policy, HeadPolicies):
                raise UnsupportedModel(
                    f"a policy by heads needs keys of each head: got {policy.own} for a model whose heads share one "
                    "latent; use SinkRecent, or the cache without a policy"
                )
            require_unsealed(format, LATENTS)
            # What stands in the place of the values is the rotary part of the keys. A guard would be in the way of
            # absorbing the up-projections.
            format = KVFormat(format.k, format.k, guard=False)
        if kind not in _HYBRID:
            return self.attention(window, format, policy)
        states = StateLayer(number_of_states=options.get("number_of_states", 1))
        return HybridLayer(self.rows.table_for(window), states, format, self.formats.exact_prefill)

    def layers(self, config: PreTrainedConfig) -> list[Any]:
        """One cache layer for each layer of the decoder that `config`, resolved, describes."""
        # Without those that an early exit (`assistant_early_exit`) leaves out: their kinds are named, and no more.
        kinds, options = compat.layer_types(config)
        # As stored: where the rank differs by layer, the config refuses to name one.
        is_latent = vars(config).get("kv_lora_rank") is not None
        policies = self._policies(options[: len(kinds)])
        return [
            self.layer(kind, kwargs, i, is_latent, policies[i]) if self.is_paged(kind) else _stock_layer(kind, kwargs)
            for i, (kind, kwargs) in enumerate(zip(kinds, options, strict=False))
        ]

    def _policies(self, options: Sequence[dict[str, Any]]) -> list[LayerPolicy]:
        """The policy of each layer that has one of its own: numbered among the layers without a window."""
        whole = [i for i, kwargs in enumerate(options) if kwargs.get("sliding_window") is None]
        policies: list[LayerPolicy] = [None] * len(options)
        for place, i in enumerate(whole if self.policy is not None and self.policy.by_layer else ()):
            policies[i] = self.policy.at(place, len(whole))  # type: ignore[union-attr]
        return policies

    def is_paged(self, kind: str) -> bool:
        """Return whether layers of a kind live in blocks."""
        return kind == "full_attention" or kind in _WINDOWED or (kind in _HYBRID and not self.rows.is_fixed)

    def resolved(self, config: PreTrainedConfig) -> "LayerMaker":
        """Number the layers that the formats name from the end; raises ValueError for one too many."""
        kinds = [kind for kind, _ in zip(*compat.layer_types(config), strict=False)]
        paged = [i for i, kind in enumerate(kinds) if self.is_paged(kind)] or [0]
        return self._replace(formats=self.formats.resolve(len(kinds), paged[0], paged[-1]))


def _stock_layer(kind: str, options: dict[str, Any]) -> Any:
    # Recurrent states, indexers and compressed keys have no blocks: transformers' own layers keep them.
    if kind not in compat.WITHOUT_KV:
        _say_once(kind)
    layer = compat.stock_layer(kind, options)
    return StateLayer(**options) if type(layer) is LinearAttentionLayer else layer


@functools.cache
def _say_once(kind: str) -> None:
    logger.warning("layers of kind %r keep transformers' own storage in a paged cache: right, but not in blocks", kind)
