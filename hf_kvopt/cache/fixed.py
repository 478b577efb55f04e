"""FixedLayer: a paged layer of fixed capacity whose length lives on the device, for torch.compile and CUDA graphs.

Row r owns the r-th equal share of the pool from the start, so tables never change, addresses stay put and a graph
that was captured once can be replayed at any length. Like `StaticCache`, and unlike the growing layers, its mask
covers the whole capacity while decoding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.errors import CacheStateError, OutOfBlocks
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.fixed_rows import FixedCentres, held_tokens, is_on_host, next_slots, require_room
from hf_kvopt.pool.handle import EqualRows, KVHandle, KVSpec, KVView, Stored
from hf_kvopt.pool.reads import FindsTables
from hf_kvopt.pool.slots import writable
from hf_kvopt.pool.storage import KVPool, Plane
from hf_kvopt.quant import NATIVE_KV, KVFormat


class FixedLayer(PagedLayer):
    """A layer of `row_capacity` tokens a row. Sliding layers keep everything: their mask hides what is behind."""

    is_compileable = True
    pool: KVPool | None  # never sealed: see `FixedSealedLayer`

    def __init__(self, table: BlockTable, format: KVFormat = NATIVE_KV, exact_prefill: bool = False) -> None:
        super().__init__(table, format, exact_prefill)
        self.is_sliding = False
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.length = torch.zeros((), dtype=torch.int64)
        self.row_capacity = 0

    @property
    def centres(self) -> FixedCentres | None:
        """Holds what is taken from the rows' keys before they are stored, where they are guarded."""
        return None if self.pool is None else self.pool.keys.row_centres

    @torch.compiler.disable(
        reason="a cache of fixed capacity takes its memory outside of a graph: feed it the prompt uncompiled, or call "
        "cache.early_initialization(batch_size, num_heads, head_dim, dtype, device) first"
    )
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        table, batch = self.table, key_states.shape[0]
        max_blocks = table.allocator.max_blocks
        assert max_blocks is not None
        if batch > max_blocks * table.block_size:
            raise OutOfBlocks(
                f"a batch of {batch} rows does not fit: got max_tokens={max_blocks * table.block_size} ({max_blocks} "
                f"blocks of {table.block_size}); raise max_tokens to at least batch_size * (prompt tokens + "
                "max_new_tokens)"
            )
        # Rounded up: batch * (prompt + new) tokens must hold the rows, whatever the block size.
        row_blocks = -(-max_blocks // batch)
        # Exactly the batch's share, so that row r begins at block r * row_blocks.
        table.allocator.max_blocks = row_blocks * batch
        self.row_capacity = row_blocks * table.block_size
        table.reserve(batch, self.row_capacity)
        super().lazy_initialization(key_states, value_states)
        with torch.inference_mode(False):
            self._make_tensors(key_states)

    def _make_tensors(self, key_states: Tensor) -> None:
        """Holds what the rows have beside their tokens, at addresses that stay."""
        assert self.pool is not None
        batch, device = key_states.shape[0], key_states.device
        self.length = self.length.to(device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.first_slots = torch.arange(batch, device=device)[:, None] * self.row_capacity
        self.block_table = self.table.rows_on(device)[0]
        if self.pool.keys.centres is not None:
            self.pool.keys.centres, self.pool.keys.row_centres = None, FixedCentres(key_states)
        self._keep_addresses()

    def _keep_addresses(self) -> None:
        """Promise that a replayed graph finds the tensors where they were."""
        assert self.pool is not None
        own = (self.length, self.seq_lens, self.first_slots, self.block_table)
        learned = () if self.centres is None else self.centres.tensors
        for tensor in (*own, *learned, *(x for plane in self.pool.planes for x in plane.tensors)):
            torch._dynamo.mark_static_address(tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.length = writable(self.length)
        if self.pool is not None:
            self.seq_lens, self.first_slots, self.block_table = map(
                writable, (self.seq_lens, self.first_slots, self.block_table)
            )
            self._keep_addresses()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        num_tokens = key_states.shape[2]
        is_new = self.pool is None
        if is_new:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        assert self.pool is not None
        slots = next_slots(self.length, self.first_slots, num_tokens, self.row_capacity)
        self.pool.store(key_states, value_states, self._learn(key_states), lambda: slots)
        # Only now: what breaks off before this was not written.
        self.length.add_(num_tokens)
        self.seq_lens.add_(num_tokens)
        if not is_on_host(self.seq_lens):
            self.seq_lens.clamp_(max=self.row_capacity)  # what lies beyond went nowhere
        # A prefill runs eagerly and knows its length; a decode step must look the same at every length.
        # The first step finds nothing before it, also where it is traced.
        seen = num_tokens if is_new else None
        kv_len = seen or (self.row_capacity if self._is_static(num_tokens) else self.held)
        # A prompt's own states are all that it reads.
        is_prompt = num_tokens > 1 and not torch.compiler.is_compiling() and kv_len == num_tokens
        is_exact = is_prompt and (self.exact_prefill or self.format.is_native)
        keys, values = (
            self._handle(plane, kv_len, states if is_exact else None)
            for plane, states in zip(self.pool.planes, (key_states, value_states), strict=True)
        )
        return keys, values

    def fork(self, table_like: FindsTables, memo: dict[int, Any]) -> "FixedLayer":
        """A copy with its own memory: addresses are fixed, so nothing can be shared."""
        twin = FixedLayer(table_like(self.table), self.format, self.exact_prefill)
        if self.pool is not None:
            # Bytes, not states: those that are read from quantized storage need not be quantized to the same again.
            twin.lazy_initialization(*(plane.no_tokens(self.table.batch_size) for plane in self.pool.planes))
            assert twin.pool is not None
            for mine, theirs in zip(self.pool.planes, twin.pool.planes, strict=True):
                for old, new in zip(mine.tensors, theirs.tensors, strict=True):
                    new.copy_(old)
            if self.centres is not None and twin.centres is not None:
                twin.centres.copy_from(self.centres)
            twin.set_length(self.held)
        return twin

    @property
    def held(self) -> int:
        """Tokens of each row; see `held_tokens` for what is raised."""
        return held_tokens(self.length, self.row_capacity)

    def require_capacity(self, batch: int, needed: int) -> None:
        """Raise OutOfBlocks where rows that grow to `needed` tokens do not fit, before anything is written."""
        max_blocks, size = self.table.allocator.max_blocks, self.table.block_size
        assert max_blocks is not None
        capacity = self.row_capacity or -(-max_blocks // batch) * size
        if needed > capacity:
            raise OutOfBlocks(
                f"this call may grow its rows to {needed} tokens: got room for {capacity} in each of {batch} rows; "
                f"raise max_tokens to at least {batch * needed}, or lower max_new_tokens"
            )

    @property
    def is_empty(self) -> bool:
        return self.pool is None or int(self.length) == 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.pool is None:
            return query_length, 0
        return (self.row_capacity if self._is_static(query_length) else self.held + query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens held: a 0-d tensor on the layer's device once there are any, as for `StaticLayer`."""
        return self.length if self.pool is not None else 0

    def get_max_length(self) -> int:
        """Tokens that a row can hold; -1 before the batch is known."""
        return self.row_capacity or -1

    def set_length(self, length: int | Tensor) -> None:
        """Forget everything behind the first `length` tokens of each row."""
        self.length.fill_(length)
        if self.pool is not None:
            self.seq_lens.fill_(length)
            if not length and self.centres is not None:
                self.centres.restart()

    def keep(self, num_tokens: int, path: Sequence[int]) -> None:
        """Keep those of the last `num_tokens` tokens of every row that `path` numbers, in that order."""
        assert self.pool is not None
        first = self.held - num_tokens
        moved = [(node, place) for place, node in enumerate(path) if node != place]
        starts = [row * self.row_capacity + first for row in range(self.table.batch_size)]
        if moved:
            src = [start + node for start in starts for node, _ in moved]
            dst = [start + place for start in starts for _, place in moved]
            self.pool.move_slots(src, dst)
            if self.centres is not None:
                self.centres.move_slots(src, dst, self.row_capacity)
        self.set_length(first + len(path))

    def select_rows(self, indices: list[int]) -> None:
        """Let row i be what row `indices[i]` was; addresses are fixed, so the rows are copied."""
        if self.pool is None:
            return
        self._require_batch(len(indices))
        for plane in self.pool.planes:
            plane.select_rows(indices)
        if self.centres is not None:
            self.centres.select(indices)

    def _require_batch(self, num_rows: int) -> None:
        """Raise CacheStateError where rows would be added or dropped."""
        if num_rows != self.table.batch_size:
            raise CacheStateError(
                f"a cache of fixed capacity keeps its batch size of {self.table.batch_size}: got {num_rows} rows; use "
                "the cache without compileable=True to change the batch"
            )

    def _handle(self, plane: Plane, kv_len: int, states: Tensor | None = None) -> KVHandle:
        shape = (self.table.batch_size, plane.num_heads, kv_len, plane.dim)
        spec = KVSpec(shape, plane.dtype, plane.format.name, plane.rotates)
        rows = EqualRows(self.block_table, self.seq_lens)
        is_graph, centres = torch.compiler.is_compiling(), plane.row_centres
        # An address must not be guarded on: the graph serves any cache of this shape.
        stored = Stored(plane.codes, plane.scale, plane.rotates) if is_graph else plane.stored
        centre = None
        if centres is not None:
            centre = centres.in_graph() if is_graph else centres.of_rows()
        return KVHandle(KVView(stored, rows, spec, centre=centre, states=states))

    def _learn(self, key_states: Tensor) -> Tensor | None:
        """Return what is taken from keys; rows that begin now learn it."""
        assert self.pool is not None
        plane = self.pool.keys
        if plane.row_centres is None:
            return None
        learn = plane.row_centres.learn_in_graph if torch.compiler.is_compiling() else plane.row_centres.learn
        return learn(key_states, self.length, plane.codes, plane.scale, plane.rotates)

    def _is_static(self, num_tokens: int) -> bool:
        return num_tokens == 1 or torch.compiler.is_compiling()

    def _stored(self, name: str) -> Tensor | None:
        if self.pool is None:
            return None
        return self._handle(getattr(self.pool, name), self.held)

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        super()._check(key_states, value_states)
        batch, _, num_tokens, _ = key_states.shape
        if batch != self.table.batch_size:
            raise CacheStateError(
                f"the cache holds {self.table.batch_size} rows: got a batch of {batch}; free() it for a new batch"
            )
        # On a GPU only where it costs nothing: a decode step must not wait for the device. A graph asks when it runs.
        if not torch.compiler.is_compiling() and (num_tokens > 1 or is_on_host(key_states)):
            require_room(num_tokens, self.held, self.row_capacity)
