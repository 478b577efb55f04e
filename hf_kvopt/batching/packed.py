"""PackedCache: what the model takes for its cache in a packed forward over several caches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.pool.packed import Cut, PackedKV


class Segment(NamedTuple):
    """The rows of one cache in a packed forward."""

    cache: PagedCache
    cut: Cut


class EmptyLooking(DynamicCache):
    """A cache that looks empty to the model: positions are passed along, and the attention makes the masks.

    Args:
        layers: of the caches behind it.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        # Past DynamicCache's __init__, which would build its own layers.
        Cache.__init__(self, layers=list(layers))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0


class PackedCache(EmptyLooking):
    """Hands each token of a packed text to the cache of its row.

    Args:
        segments: the caches, and which tokens are theirs.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments[0].cache.layers)
        self.segments = list(segments)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store packed states [1, num_kv_heads, tokens, head_dim]; see `PagedCache.update`."""
        keys, values = [], []
        for cache, cut in self.segments:
            k, v = cache.update(cut.rows_of(key_states), cut.rows_of(value_states), layer_idx)
            keys.append(k)
            values.append(v)
        cuts = [cut for _, cut in self.segments]
        return PackedKV(keys, cuts), PackedKV(values, cuts)


def pack(parts: Sequence[tuple[PagedCache, Sequence[int]]], device: torch.device) -> list[Segment]:
    """Lay rows behind each other in one packed text; each part is a cache and the new tokens of each of its rows."""
    segments, first = [], 0
    for cache, counts in parts:
        segments.append(Segment(cache, Cut(first, counts, device)))
        first += sum(counts)
    return segments
