"""HeadwiseLayer: one attention layer whose KV heads hold unlike many tokens, in two pools over two block tables.

heads that keep all    this layer itself: pool of [num_blocks, block_size, whole heads, head_dim]
the others             `others`, a layer of their own over the table that drops; in step with this one
"""

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.handle import KVHandle
from hf_kvopt.pool.headwise import HeadwiseKV
from hf_kvopt.pool.reads import FindsTables
from hf_kvopt.pool.sealed_pool import SealedPool
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.quant import NATIVE_KV, KVFormat


class HeadwiseLayer(PagedLayer):
    """A paged layer that keeps some KV heads itself, and hands the others to a layer that drops tokens.

    Args:
        table: of the heads that keep all.
        others: the layer of the other heads.
        heads: numbers of the KV heads that keep all, ascending; at least one.
        format: see `PagedLayer`.
        exact_prefill: see `PagedLayer`.
    """

    def __init__(
        self,
        table: BlockTable,
        others: PagedLayer,
        heads: tuple[int, ...],
        format: KVFormat = NATIVE_KV,
        exact_prefill: bool = False,
    ) -> None:
        super().__init__(table, format, exact_prefill)
        self.others, self.heads = others, heads
        self._places: tuple[int, list[Tensor]] | None = None

    @property
    def pools(self) -> list[KVPool | SealedPool]:
        return [*super().pools, *self.others.pools]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `PagedLayer.update`.

        Raises:
            UnsupportedModel: also where the layer has other KV heads than were named.
        """
        heads = self._numbers(key_states)
        if not len(heads[1]):
            return super().update(key_states, value_states, *args, **kwargs)
        self.others.clock = self.clock
        # The others first: until this layer has written, its clock says where the forward began.
        few = self.others.update(*(states.index_select(1, heads[1]) for states in (key_states, value_states)))
        many = super().update(*(states.index_select(1, heads[0]) for states in (key_states, value_states)))
        return HeadwiseKV((many[0], few[0]), heads), HeadwiseKV((many[1], few[1]), heads)

    def fork(self, table_like: FindsTables, memo: dict[int, Any]) -> "HeadwiseLayer":
        others = self.others.fork(table_like, memo)
        twin = HeadwiseLayer(table_like(self.table), others, self.heads, self.format, self.exact_prefill)
        twin.follow(self)
        return twin

    def begin_anew(self, table_like: FindsTables) -> None:
        super().begin_anew(table_like)
        self.others.begin_anew(table_like)

    def forget(self) -> None:
        super().forget()
        self.others.forget()

    def prefetch(self) -> None:
        super().prefetch()
        self.others.prefetch()

    def _empty_twin(self, table: BlockTable, memo: dict[int, Any]) -> "HeadwiseLayer":
        others = self.others._empty_twin(self.others.table, memo)
        return HeadwiseLayer(table, others, self.heads, self.format, self.exact_prefill)

    def _stored(self, name: str) -> Tensor | None:
        mine = super()._stored(name)
        if mine is None or self._places is None or not self.others.is_initialized:
            return mine
        self.others.clock = self.clock
        rest = self.others._stored(name)
        return HeadwiseKV((mine, rest), self._places[1]) if isinstance(rest, KVHandle) else mine

    def _numbers(self, states: Tensor) -> list[Tensor]:
        """Return the numbers of whole heads and of the others, on the device of states [batch, num_kv_heads, ...]."""
        num_heads = states.shape[1]
        if self._places is not None and self._places[0] == num_heads and self._places[1][0].device == states.device:
            return self._places[1]
        if self.heads[-1] >= num_heads:
            raise UnsupportedModel(
                f"a policy keeps whole heads {list(self.heads)} of a layer: got a layer of {num_heads} KV heads in "
                "this process; name heads that it has (retrieval_heads(model) measures them), and do not divide the "
                "model over ranks"
            )
        rest = [head for head in range(num_heads) if head not in self.heads]
        with torch.inference_mode(False):
            numbers = [torch.tensor(some, dtype=torch.long, device=states.device) for some in (self.heads, rest)]
        self._places = num_heads, numbers
        return numbers
