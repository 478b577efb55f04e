"""FixedLayer: a paged layer of fixed capacity whose length lives on the device, for torch.compile and CUDA graphs.

Row r owns the r-th equal share of the pool from the start, so tables never change, addresses stay put and a graph
that was captured once can be replayed at any length. Like `StaticCache`, and unlike the growing layers, its mask
covers the whole capacity while decoding.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.errors import CacheStateError, OutOfBlocks
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.handle import HandleSpec, KVHandle, row_views
from hf_kvopt.pool.storage import Plane
from hf_kvopt.quant import CENTRE_TOKENS, NATIVE_KV, KVFormat, centre_of


class FixedLayer(PagedLayer):
    """A layer of `row_capacity` tokens a row. Sliding layers keep everything: their mask hides what is behind."""

    is_compileable = True

    def __init__(self, table: BlockTable, format: KVFormat = NATIVE_KV, exact_prefill: bool = False) -> None:
        super().__init__(table, format, exact_prefill)
        self.is_sliding = False
        self.length = torch.zeros((), dtype=torch.int64)
        self.row_capacity = 0
        self.centre: Tensor | None = None  # [batch, num_kv_heads, head_dim], of the keys of each row

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        table, batch = self.table, key_states.shape[0]
        max_blocks = table.allocator.max_blocks
        assert max_blocks is not None
        row_blocks = max_blocks // batch
        if row_blocks == 0:
            raise OutOfBlocks(
                f"a batch of {batch} rows does not fit: got max_tokens={max_blocks * table.block_size} ({max_blocks} "
                f"blocks of {table.block_size}); raise max_tokens to at least batch_size * (prompt tokens + "
                "max_new_tokens), each row in whole blocks"
            )
        # Exactly the batch's share, so that row r begins at block r * row_blocks.
        table.allocator.max_blocks = row_blocks * batch
        self.row_capacity = row_blocks * table.block_size
        table.reserve(batch, self.row_capacity)
        super().lazy_initialization(key_states, value_states)
        device = key_states.device
        self.length = self.length.to(device)
        self.block_table, _, _ = table.rows_on(device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        if not torch.compiler.is_compiling():
            assert self.pool is not None
            for tensor in (
                self.length,
                self.seq_lens,
                self.block_table,
                *(x for plane in self.pool.planes for x in plane.tensors),
            ):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        num_tokens = key_states.shape[2]
        is_new = self.pool is None
        if is_new:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        assert self.pool is not None
        key_states_stored = self._guarded(key_states, is_new)
        positions = torch.arange(num_tokens, device=key_states.device) + self.length
        first_slots = torch.arange(len(key_states), device=positions.device)[:, None] * self.row_capacity
        self.pool.store(key_states_stored, value_states, (first_slots + positions).reshape(-1))
        # Only now: what breaks off before this was not written.
        self.length.add_(num_tokens)
        self.seq_lens.add_(num_tokens)
        # A prefill runs eagerly and knows its length; a decode step must look the same at every length.
        # The first step finds nothing before it, also where it is traced.
        seen = num_tokens if is_new else None
        kv_len = seen or (self.row_capacity if self._is_static(num_tokens) else int(self.length))
        # A prompt's own states are all that it reads.
        is_prompt = num_tokens > 1 and not torch.compiler.is_compiling() and kv_len == num_tokens
        is_exact = is_prompt and (self.exact_prefill or self.format.is_native)
        keys, values = (
            self._handle(plane, kv_len, states if is_exact else None)
            for plane, states in zip(self.pool.planes, (key_states, value_states), strict=True)
        )
        return keys, values

    def fork(self, table: BlockTable, memo: dict[int, Any]) -> "FixedLayer":
        """A copy with its own memory: addresses are fixed, so nothing can be shared."""
        twin = FixedLayer(table, self.format, self.exact_prefill)
        if self.pool is not None:
            # Bytes, not states: those that are read from quantized storage need not be quantized to the same again.
            twin.lazy_initialization(*(plane.no_tokens(self.table.batch_size) for plane in self.pool.planes))
            assert twin.pool is not None
            for mine, theirs in zip(self.pool.planes, twin.pool.planes, strict=True):
                for old, new in zip(mine.tensors, theirs.tensors, strict=True):
                    new.copy_(old)
            if self.pool.keys.centres is not None:
                twin.pool.keys.centres = copy.deepcopy(self.pool.keys.centres)
            twin.centre = self.centre
            twin.set_length(int(self.length))
        return twin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.pool is None:
            return query_length, 0
        return (self.row_capacity if self._is_static(query_length) else int(self.length) + query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens held: a 0-d tensor on the layer's device once there are any, as for `StaticLayer`."""
        return self.length if self.pool is not None else 0

    def get_max_length(self) -> int:
        """Tokens that a row can hold; -1 before the batch is known."""
        return self.row_capacity or -1

    def set_length(self, length: int) -> None:
        """Forget everything behind the first `length` tokens of each row."""
        self.length.fill_(length)
        if self.pool is not None:
            self.seq_lens.fill_(length)
            if not length and self.pool.keys.centres is not None:
                self.pool.keys.centres.early.clear()

    def keep(self, num_tokens: int, path: Sequence[int]) -> None:
        """Of the last `num_tokens` tokens of every row keep those numbered in `path`, in that order."""
        assert self.pool is not None
        first = int(self.length) - num_tokens
        moved = [(node, place) for place, node in enumerate(path) if node != place]
        starts = [row * self.row_capacity + first for row in range(self.table.batch_size)]
        if moved:
            self.pool.move_slots([a + node for a in starts for node, _ in moved],
                                 [a + place for a in starts for _, place in moved])  # fmt: skip
        self.set_length(first + len(path))

    def select_rows(self, indices: list[int]) -> None:
        """Let row i be what row `indices[i]` was; addresses are fixed, so the rows are copied."""
        if self.pool is None:
            return
        if len(indices) != self.table.batch_size:
            raise CacheStateError(
                f"a cache of fixed capacity keeps its batch size of {self.table.batch_size}: got {len(indices)} rows; "
                "use PagedCache without compileable=True to change the batch"
            )
        for plane in self.pool.planes:
            for tensor in plane.tensors:
                rows = row_views(tensor, self.table.batch_size)
                rows.copy_(rows[indices])
        if self.centre is not None:
            self.centre = self.centre[indices]
        if self.pool.keys.centres is not None:
            src = [block for row in indices for block in self.table.rows[row]]
            self.pool.keys.centres.copy_blocks(src, [block for row in self.table.rows for block in row])

    def _handle(self, plane: Plane, kv_len: int, states: Tensor | None = None) -> KVHandle:
        shape = (self.table.batch_size, plane.num_heads, kv_len, plane.dim)
        spec = HandleSpec(shape, plane.dtype, plane.format.name, plane.rotates)
        centre = None if plane.centres is None else self.centre
        # An address must not be guarded on: the graph serves any cache of this shape.
        place = None if torch.compiler.is_compiling() else plane.place
        return KVHandle(
            plane.codes, plane.scale, self.block_table, self.seq_lens, spec, states=states, centre=centre, place=place
        )

    def _guarded(self, key_states: Tensor, is_new: bool) -> Tensor:
        """Keys as they go into the pool; rows that begin now learn their centre."""
        assert self.pool is not None
        plane, num_tokens = self.pool.keys, key_states.shape[2]
        if plane.centres is None:
            return plane.guarded(key_states, None)
        if torch.compiler.is_compiling():
            self.centre = self._learned_in_graph(key_states, is_new)
        # A GPU is asked for the length by prompts alone, and behind a short one: a decode step must not wait.
        elif num_tokens and (is_new or num_tokens > 1 or plane.centres.early or key_states.device.type == "cpu"):
            length = int(self.length)
            if not length or plane.centres.early:
                self.centre = plane.learn(key_states, self.table, length, length + num_tokens)
        return plane.guarded(key_states, self.centre)

    def _learned_in_graph(self, key_states: Tensor, is_new: bool) -> Tensor | None:
        """The same where nothing may be asked for: from a prompt of two or more tokens in one forward."""
        if key_states.shape[2] == 1:
            return self.centre
        learned = centre_of(key_states[:, :, :CENTRE_TOKENS])
        if is_new:
            return learned
        return torch.where(self.length == 0, learned, 0.0 if self.centre is None else self.centre)

    def _is_static(self, num_tokens: int) -> bool:
        return num_tokens == 1 or torch.compiler.is_compiling()

    def _stored(self, name: str) -> Tensor | None:
        if self.pool is None:
            return None
        return self._handle(getattr(self.pool, name), int(self.length))

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        super()._check(key_states, value_states)
        batch, _, num_tokens, _ = key_states.shape
        if batch != self.table.batch_size:
            raise CacheStateError(
                f"the cache holds {self.table.batch_size} rows: got a batch of {batch}; free() it for a new batch"
            )
        # On a GPU only where it costs nothing: a decode step must not wait for the device.
        if (num_tokens > 1 or key_states.device.type == "cpu") and int(self.length) + num_tokens > self.row_capacity:
            raise OutOfBlocks(
                f"{num_tokens} more tokens a row were asked for: got {int(self.length)} of {self.row_capacity} used; "
                "raise max_tokens to at least batch_size * (prompt tokens + max_new_tokens)"
            )
