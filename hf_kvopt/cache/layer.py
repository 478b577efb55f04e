"""PagedLayer: one attention layer of a paged cache, as transformers' `Cache` sees it.

`update` plans the step once for all layers of the kind (`BlockTable.reserve`), writes the new tokens into this
layer's pool and hands back two `KVHandle`s. Operations on the batch or the length live on the cache, because all
layers of a kind share one table.
"""

from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.bounds import bounds_for, require_tokens
from hf_kvopt.pool.fixed_rows import is_on_host
from hf_kvopt.pool.handle import KVHandle
from hf_kvopt.pool.plane import Plane
from hf_kvopt.pool.reads import FindsTables
from hf_kvopt.pool.sealed_pool import SealedPool
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.quant import NATIVE_KV, KVFormat


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer in blocks.

    Between calls: the layer has written the columns up to `clock` of the table that it shares, `num_new` of them in its
    last update. `in_step` says whether that update ended in the same column as that of the cache's first layer: a layer
    that was never written, reads an image instead of the text, or sat out a forward, does not keep step.

    Args:
        table: the rows of all layers of this kind; its window makes the layer a sliding one.
        format: how keys and values are stored.
        exact_prefill: hand the states of a first prompt out as they came, and not as they were stored.
    """

    is_croppable = True

    # No super().__init__(): it would assign the `keys` and `values` that are computed here.
    def __init__(self, table: BlockTable, format: KVFormat = NATIVE_KV, exact_prefill: bool = False) -> None:
        self.table, self.format, self.exact_prefill = table, format, exact_prefill
        self.pool: KVPool | SealedPool | None = None
        self.clock = self.num_new = 0
        self.in_step = False
        self.is_first = False  # of its table to make a pool: a whole forward is checked at it
        self.is_sliding = table.window is not None
        if table.window is not None:
            self.sliding_window = table.window

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.pool is not None

    @property
    def pools(self) -> list[KVPool | SealedPool]:
        """Return all storage of this layer."""
        return [] if self.pool is None else [self.pool]

    @property
    def record_past(self) -> bool:
        """Return whether blocks behind the window are kept until the next crop."""
        return self.table.record_past

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Return [batch, num_kv_heads, tokens held, head_dim], by reference; None before there is a pool."""
        return self._stored("keys")

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Return the values held, [batch, num_kv_heads, tokens held, v_head_dim]; see `keys`."""
        return self._stored("values")

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the states as the model sees them."""
        return self.pool.keys.dtype if self.pool else None

    @property
    def device(self) -> torch.device | None:
        """Return the device on which the layer computes, also while its pool is offloaded."""
        return self.pool.keys.home if self.pool else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        allocator = self.table.allocator
        self.table.keep_contiguous = is_on_host(key_states)
        self.pool = self.make_pool(key_states, value_states)
        self.is_first = self.is_first or not allocator.pools
        self.pool.reads.is_first = self.is_first
        allocator.pools.append(self.pool)

    def make_pool(self, key_states: Tensor, value_states: Tensor) -> KVPool | SealedPool:
        """Storage for states [batch, num_kv_heads, any, head_dim] of this layer's format, over its table's blocks."""
        allocator = self.table.allocator
        if self.format.sealed is not None:
            require_tokens(self.table.policy)
            return SealedPool(key_states, value_states, allocator, self.format.sealed)
        pool = KVPool(key_states, value_states, self.table.block_size, allocator.num_blocks, self.format)
        pool.reads.bounds = bounds_for(self.table.policy, pool.keys)
        return pool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [batch, num_kv_heads, q_len, head_dim] behind what is held, and hand back all that a query may see.

        Raises:
            CacheStateError: another batch size, another model's geometry, or gradients are on.
            OutOfBlocks: the cap is reached; nothing was written.
        """
        # Asked here and not by a decorator, which costs a decode step more than the question.
        append = _append_outside_a_graph if torch.compiler.is_compiling() else PagedLayer._append
        return append(self, key_states, value_states)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._check(key_states, value_states)
        if self.pool is None:
            self.lazy_initialization(key_states, value_states)
        assert self.pool is not None
        pool, table, start = self.pool, self.table, self.clock
        batch, _, num_tokens, _ = key_states.shape
        replaces = table.window is not None and table.replaces_window(num_tokens)
        past = self._past_dense(pool, table.visible_start(start)) if replaces and isinstance(pool, KVPool) else None
        step = table.advance(batch, start, num_tokens)
        pool.write(key_states, value_states, table, step.start, step.stop)
        self.clock = step.stop  # only now: what breaks off before this was not written
        keys, values = None, None
        if replaces and isinstance(pool, KVPool):
            # Only a window is kept, but this step's first queries look further back: they get the states as they came.
            new = self._as_read(pool, key_states, value_states)
            keys, values = _behind(past, 0, new[0]), _behind(past, 1, new[1])
        elif start == 0 and (self.exact_prefill or self.format.is_native):
            keys, values = key_states, value_states
        k, v = pool.views(table, step.kv_len, step.skip, (keys, values), (key_states, value_states))
        return KVHandle(k, pool.reads, True), KVHandle(v, pool.reads, True)

    def claim(self, batch_size: int, num_tokens: int) -> None:
        """Make room for tokens whose keys and values a kernel writes itself, where `table.slots` says.

        Raises:
            CacheStateError, OutOfBlocks: see `BlockTable.reserve`.
        """
        self.clock = self.table.advance(batch_size, self.clock, num_tokens).stop

    def fork(self, table_like: FindsTables, memo: dict[int, Any]) -> "PagedLayer":
        """Make a layer over the same pool whose rows are those of `table_like(table)`, a fork of this layer's."""
        twin = self._empty_twin(table_like(self.table), memo)
        twin.follow(self)
        return twin

    def begin_anew(self, table_like: FindsTables) -> None:
        """Give the pool back, and hold nothing over the table that takes the place of this layer's."""
        self.pool, self.table = None, table_like(self.table)
        self.forget()

    def follow(self, other: "PagedLayer") -> None:
        """Hold what `other` holds, in the same pool."""
        self.pool, self.clock, self.num_new, self.in_step = other.pool, other.clock, other.num_new, other.in_step

    @property
    def is_empty(self) -> bool:
        """Return whether the layer holds no token of any row."""
        return self.clock <= min(self.table.lags, default=0)

    def forget(self) -> None:
        """Hold nothing, and know nothing of what a forward writes; the pool stays."""
        self.clock = self.num_new = 0
        self.in_step = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedLayer":
        """Make a further layer of the same cache: over this layer's table, with a pool of its own.

        For models that pass through some of their layers several times, and append to `cache.layers` one copy of
        these for each further pass. A deep copy of the cache itself is a fork and does not come here.

        Raises:
            CacheStateError: the layer holds tokens.
        """
        held = int(self.get_seq_length())
        if held:
            raise CacheStateError(
                f"one layer of a paged cache was copied: got a layer that holds {held} tokens, in blocks that belong "
                "to all layers together; copy the cache with copy.deepcopy(cache), or the states alone with "
                "layer.keys.clone()"
            )
        return self._empty_twin(self.table, memo)

    def __copy__(self) -> "PagedLayer":
        """See `__deepcopy__`: two layers over one pool would overwrite each other."""
        return self.__deepcopy__({})

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if query_length == 0 and self._num_columns():
            raise CacheStateError(
                f"no new token was fed to a cache that holds {self._num_columns()}: got a cache that is not shorter "
                "than the prompt, of which transformers then leaves nothing; call cache.reset(), or cache.crop(-n) so "
                "that at least the last prompt token is missing"
            )
        start = self.table.next_start(self.clock)
        return self._num_columns() + query_length - start, start

    def get_seq_length(self) -> int:
        return self._num_columns()

    def get_max_length(self) -> int:
        return -1 if self.table.window is None else self.table.window

    def offload(self) -> None:
        for pool in self.pools:
            pool.to(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.pool is not None:
            self.pool.to(self.pool.keys.home)

    def reset(self) -> None:
        self._refuse("reset")

    def crop(self, tokens_to_remove: int) -> None:
        """Layers of a kind share a table: only the cache can do this."""
        self._refuse("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._refuse("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("batch_select_indices")

    def _empty_twin(self, table: BlockTable, memo: dict[int, Any]) -> Self:
        """Make a layer of the same kind and format over `table` that holds nothing yet."""
        return type(self)(table, self.format, self.exact_prefill)

    def _num_columns(self) -> int:
        """Columns that this layer has written; in a step it may lag behind the table."""
        return self.clock

    def _stored(self, name: str) -> Tensor | None:
        if self.pool is None:
            return None
        plane: Plane = getattr(self.pool, name)
        if not self.table.rows:
            return plane.no_tokens(0)  # initialized, which says that there is a tensor
        first = self.table.visible_start(self.clock)
        view = plane.view(self.table, self._num_columns() - first, first - self.table.base)
        return KVHandle(view, self.pool.reads)

    def _as_read(self, pool: KVPool, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a query of this step sees of its own states."""
        if self.exact_prefill:
            return key_states, value_states
        return pool.as_stored(key_states, value_states, self.table)

    def _past_dense(self, pool: KVPool, first: int) -> tuple[Tensor, ...] | None:
        """Return a copy of what a query sees of the past: in the table, or for later layers in what it retired."""
        table = self.table if self.table.clock == self.clock else self.table.retired
        if table is None or not table.rows:
            return None
        held = self._num_columns() - first
        return tuple(plane.read(table, held, first - table.base).clone() for plane in pool.planes)

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise CacheStateError(
                "a paged cache keeps no graph of its writes: got states that require gradients; run the model under "
                "torch.no_grad() or torch.inference_mode(), or train with use_cache=False"
            )
        pool = self.pool
        if pool is None or pool.matches(key_states, value_states):
            return
        if torch.compiler.is_compiling() or not self.is_empty:
            held = " and ".join(f"[{plane.num_heads}, {plane.dim}] in {plane.dtype}" for plane in pool.planes)
            given = " and ".join(f"{list(states.shape)} in {states.dtype}" for states in (key_states, value_states))
            raise CacheStateError(
                f"this layer of the cache holds keys and values of {held} (heads, head_dim) on {pool.keys.home}: got "
                f"{given} on {key_states.device}; use one cache a model, and call cache.reset() when the model changes "
                "(store.clear() for a PrefixStore that was made without its model)"
            )
        # Forks may read the old pool; without any its memory is free before the new one takes its own.
        self.is_first = self.is_first or pool.reads.is_first
        del pool
        self.pool = None
        self.lazy_initialization(key_states, value_states)

    def _refuse(self, name: str) -> NoReturn:
        raise CacheStateError(
            f"{name} was called on one layer of a paged cache: got a layer whose table other layers share; call "
            f"cache.{name}(...) on the cache"
        )


def _behind(past: tuple[Tensor, ...] | None, idx: int, states: Tensor) -> Tensor:
    return states if past is None else torch.cat([past[idx], states], dim=2)


_append_outside_a_graph = torch.compiler.disable(
    PagedLayer._append, reason="a growing cache: use PagedCache(max_tokens=..., compileable=True)"
)
