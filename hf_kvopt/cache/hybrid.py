"""HybridLayer: keys and values in blocks beside transformers' own convolution and recurrent states.

For layers that hold both (Falcon-H1, Zamba2, ...). The states have no token axis, so the stock layer keeps them.
"""

import copy
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.quant import NATIVE_KV, KVFormat


class HybridLayer(PagedLayer):
    """A paged layer that answers for its linear-attention states as well.

    Args:
        table: see `PagedLayer`.
        states: the stock layer with the states; batch operations on it are the cache's business too.
        format: see `PagedLayer`, of the keys and values.
        exact_prefill: see `PagedLayer`.
    """

    is_croppable = False

    def __init__(
        self,
        table: BlockTable,
        states: LinearAttentionLayer,
        format: KVFormat = NATIVE_KV,
        exact_prefill: bool = False,
    ) -> None:
        super().__init__(table, format, exact_prefill)
        self.states = states

    def __getattr__(self, name: str) -> Any:
        # has_previous_state, conv_states, recurrent_states, ...: what Cache asks of a linear-attention layer.
        if name == "states":
            raise AttributeError(name)
        return getattr(self.states, name)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """See `LinearAttentionLayer`."""
        return self.states.update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """See `LinearAttentionLayer`."""
        return self.states.update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def offload(self) -> None:
        super().offload()
        self.states.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self.states.prefetch()

    def _empty_twin(self, table: BlockTable, memo: dict[int, Any]) -> Self:
        return type(self)(table, copy.deepcopy(self.states, memo), self.format, self.exact_prefill)


# Cache asks by type whether a layer has such states; the states themselves are delegated, so nothing is inherited.
LinearAttentionCacheLayerMixin.register(HybridLayer)
