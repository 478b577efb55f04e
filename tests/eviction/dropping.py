"""A cache of transformers' own kind that drops tokens as a policy says: plain tensors, cut by plain indices.

For whatever `generate` does with rows that have no padding: beams, groups of samples, processors.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_kvopt import EvictionPolicy
from tests.eviction.reference import kept


class DroppingLayer(DynamicLayer):
    """Keys and values of the tokens numbered in `numbers`, of a text of `length` tokens."""

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__()
        self.policy, self.numbers, self.length = policy, [], 0

    def update(self, key_states, value_states, *args, **kwargs):
        if self.length:
            left = set(kept(self.policy, self.length))
            index = torch.tensor([i for i, number in enumerate(self.numbers) if number in left])
            self.keys, self.values = self.keys[:, :, index], self.values[:, :, index]
            self.numbers = [number for number in self.numbers if number in left]
        self.numbers += range(self.length, self.length + key_states.shape[2])
        self.length += key_states.shape[2]
        return super().update(key_states, value_states)

    def get_seq_length(self):
        return self.length

    def get_mask_sizes(self, query_length):
        held = len(set(self.numbers) & set(kept(self.policy, self.length)))
        return held + query_length, self.length - held


def dropping_cache(policy: EvictionPolicy, num_layers: int) -> DynamicCache:
    """Make a cache with one such layer for each layer of a model."""
    cache = DynamicCache()
    cache.layers = [DroppingLayer(policy) for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    return cache
