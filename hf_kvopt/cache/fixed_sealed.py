"""FixedSealedLayer: a layer of fixed capacity whose full blocks are sealed.

    prompt   uncompiled, by the block table of the host, as in a growing cache
    step     one token a row, compiled or not: by tensors on the device that `AheadTable.publish` filled before it

A step writes each token to its exact place, and seals the block that it fills. What it reads follows from positions, so
it equals the step of a growing cache.
"""

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.cache.fixed import FixedLayer
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.errors import CacheStateError, OutOfBlocks
from hf_kvopt.pool import sealed_step  # noqa: F401 - registers the ops
from hf_kvopt.pool.ahead import AheadTable
from hf_kvopt.pool.fixed_rows import is_on_host, require_room
from hf_kvopt.pool.handle import EqualRows, KVHandle, KVSpec, KVView, SealedStep, Stored
from hf_kvopt.pool.reads import FindsTables
from hf_kvopt.pool.sealed import SealedPlane
from hf_kvopt.pool.sealed_pool import SealedPool
from hf_kvopt.pool.slots import writable


class FixedSealedLayer(FixedLayer):
    """A layer of `row_capacity` tokens a row; its table is an `AheadTable`, which the first layer keeps up to date."""

    pool: SealedPool | None  # type: ignore[assignment]
    table: AheadTable
    centres = None

    @torch.compiler.disable(reason="sealed blocks of fixed capacity are filled uncompiled: feed the prompt uncompiled")
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        table, batch = self.table, key_states.shape[0]
        max_blocks, size = table.allocator.max_blocks, table.block_size
        assert max_blocks is not None
        if batch > max_blocks * size:
            raise OutOfBlocks(
                f"a batch of {batch} rows does not fit: got max_tokens={max_blocks * size}; raise max_tokens to at "
                "least batch_size * (prompt tokens + max_new_tokens)"
            )
        if not table.capacity:
            table.prepare(batch, -(-max_blocks // batch), key_states.device)
        self.row_capacity = table.capacity
        PagedLayer.lazy_initialization(self, key_states, value_states)
        with torch.inference_mode(False):
            self.length = self.length.to(key_states.device)
        self._keep_addresses()

    def _keep_addresses(self) -> None:
        assert self.pool is not None
        stored = (x for plane in self.pool.planes for x in plane.tensors)
        for tensor in (self.length, *self.table.tensors, *stored):
            torch._dynamo.mark_static_address(tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.length = writable(self.length)
        if self.pool is not None:
            self._keep_addresses()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._is_static(key_states.shape[2]):
            return _read_on_host(self, key_states, value_states)
        self._check(key_states, value_states)
        pool, table = self.pool, self.table
        assert pool is not None
        planes = [part for plane in pool.planes for part in _parts(plane)]
        blocks, places, lags = table.tensors
        torch.ops.hf_kvopt.write_sealed(
            key_states, value_states, *planes, blocks, places, lags, self.length, self.format.name
        )
        self.length.add_(1)
        seq_lens = (self.length.clamp(max=self.row_capacity) - lags).to(torch.int32)
        return self._handle(pool.keys, seq_lens), self._handle(pool.values, seq_lens)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write and read by the host's table, behind what steps on the device wrote."""
        table = self.table
        self._check(key_states, value_states)
        if self.is_first or not table.allocator.pools:
            self._take_table_back()
        try:
            self.clock = int(self.length)
            handles = super()._append(key_states, value_states)
            self.length.fill_(self.clock)
        finally:
            self.clock = 0  # as in all layers of fixed capacity: the length alone says how much is held
        version = table.version
        table.publish()
        if version == table.version:
            return handles
        assert self.pool is not None
        views = [handle._view for handle in handles if isinstance(handle, KVHandle)]
        k, v = (view._replace(version=table.version) for view in views)
        for old, new in zip(views, (k, v), strict=True):
            new.__dict__.update(old.__dict__)
        return KVHandle(k, self.pool.reads, True), KVHandle(v, self.pool.reads, True)

    def fork(self, table_like: FindsTables, memo: dict[int, Any]) -> "FixedSealedLayer":
        """A copy with its own memory: addresses are fixed, so nothing can be shared."""
        table = table_like(self.table)
        assert isinstance(table, AheadTable)
        twin = FixedSealedLayer(table, self.format, self.exact_prefill)
        if self.pool is None:
            return twin
        twin.lazy_initialization(*(plane.no_tokens(len(self.table.block_table)) for plane in self.pool.planes))
        if not table.rows:
            table.become(self.table)
        assert twin.pool is not None
        for mine, theirs in zip(self.pool.planes, twin.pool.planes, strict=True):
            for old, new in zip(mine.tensors, theirs.tensors, strict=True):
                new.copy_(old)
        twin.length.copy_(self.length)
        return twin

    def set_length(self, length: int | Tensor) -> None:
        """Forget everything behind the first `length` tokens of each row; waits for the device."""
        length = int(length)
        if self.is_first and not length:
            self.table.clear()
        elif self.is_first and self.pool is not None:
            self._take_table_back()
            if length < self.table.clock:
                self.table.crop(self.table.clock - length)
            self.table.publish()
        self.length.fill_(length)

    def keep(self, num_tokens: int, path: Any) -> None:
        """See `FixedLayer.keep`."""
        first = self.held - num_tokens
        if self.is_first:
            self._take_table_back()
            self.table.keep(num_tokens, [path] * len(self.table.rows))
            self.table.publish()
        self.length.fill_(first + len(path))

    def select_rows(self, indices: list[int]) -> None:
        """Let row i be what row `indices[i]` was; addresses are fixed, so the rows are copied."""
        if self.pool is None or not self.is_first or not self.table.rows:
            return
        self._require_batch(len(indices))
        if indices != list(range(len(indices))):
            self._take_table_back()
            self.table.select(indices)
            self.table.publish()

    def _take_table_back(self) -> None:
        """Let the host's table stand where the device does; a step that broke off is undone."""
        held = self.held
        self.table.resume(held)
        self.table.rollback(held)

    def _handle(self, plane: SealedPlane, seq_lens: Tensor) -> KVHandle:  # type: ignore[override]
        """Hand out all that is held, as the last token of each row reads it."""
        blocks, places, lags = self.table.tensors
        assert self.pool is not None
        shape = (len(blocks), plane.num_heads, self.row_capacity, plane.dim)
        spec = KVSpec(shape, plane.dtype, self.format.name, is_key=plane is self.pool.keys)
        codes, token, mean, exact = _parts(plane)
        assert codes is not None
        step = SealedStep(token, mean, exact, places, lags)  # type: ignore[arg-type]
        return KVHandle(KVView(Stored(codes, None, sealed=step), EqualRows(blocks, seq_lens), spec))

    def _is_static(self, num_tokens: int) -> bool:
        return num_tokens == 1 and self.pool is not None and self.table.is_published

    def _stored(self, name: str) -> Tensor | None:
        if self.pool is None:
            return None
        plane: SealedPlane = getattr(self.pool, name)
        if not self.table.is_published:
            return plane.no_tokens(self.table.batch_size)
        seq_lens = (self.length - self.table.lags_on).to(torch.int32)
        return self._handle(plane, seq_lens)[:, :, : self.held]

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        PagedLayer._check(self, key_states, value_states)
        batch, _, num_tokens, _ = key_states.shape
        rows = len(self.table.block_table) if self.table.capacity else batch
        if batch != rows:
            raise CacheStateError(f"the cache holds {rows} rows: got a batch of {batch}; free() it for a new batch")
        if not torch.compiler.is_compiling() and self.row_capacity and (num_tokens > 1 or is_on_host(key_states)):
            require_room(num_tokens, self.held, self.row_capacity)


def _parts(plane: SealedPlane) -> tuple[Tensor | None, ...]:
    """Codes, token, mean where there is one, and exact."""
    codes, token, *mean = plane.stored
    return codes, token, mean[0] if mean else None, plane.exact


_read_on_host = torch.compiler.disable(
    FixedSealedLayer._append, reason="sealed blocks of fixed capacity are filled uncompiled: feed the prompt uncompiled"
)
