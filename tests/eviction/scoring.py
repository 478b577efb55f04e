"""What a prompt shrinks to, from the weights that eager attention returns, and a plain cache that holds just that."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_kvopt import CACHE_KEYWORD

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


class ShrunkLayer(DynamicLayer):
    """Keys and values of some tokens of a text of `length` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.length = length
        DynamicLayer.update(self, keys, values)

    def update(self, key_states, value_states, *args, **kwargs):
        self.length += key_states.shape[2]
        return super().update(key_states, value_states)

    def get_seq_length(self):
        return self.length

    def get_mask_sizes(self, query_length):
        held = self.keys.shape[2]
        return held + query_length, self.length - held


def shrunk_tokens(model: PreTrainedModel, ids: Tensor, num_new: int, choose: Choose) -> Tensor:
    """Greedy tokens of an eager model behind ids [1, n], whose keys shrink to what `choose` picks.

    Args:
        model: with eager attention.
        ids: without padding.
        num_new: tokens to generate.
        choose: of weights [num_heads, n, n], keys and values [num_kv_heads, n, dim] of a layer, the tokens
            [num_kv_heads, count] that each head keeps.
    """
    with torch.no_grad():
        out = model(input_ids=ids, output_attentions=True, use_cache=True)
        cache, layers = out.get(CACHE_KEYWORD), []
        for layer, weights in zip(cache.layers, out.attentions, strict=True):
            index = choose(weights[0], layer.keys[0], layer.values[0])[None, :, :, None]
            keys, values = (
                states.gather(2, index.expand(-1, -1, -1, states.shape[-1])) for states in (layer.keys, layer.values)
            )
            layers.append(ShrunkLayer(keys, values, ids.shape[1]))
        plain = DynamicCache()
        plain.layers, plain.layer_class_to_replicate = layers, None
        x, tokens = out.logits[:, -1:].argmax(-1), [ids]
        for step in range(num_new):
            tokens.append(x)
            position = torch.tensor([[ids.shape[1] + step]])
            logits = model(input_ids=x, position_ids=position, **{CACHE_KEYWORD: plain}).logits
            x = logits[:, -1:].argmax(-1)
    return torch.cat(tokens, dim=1)
