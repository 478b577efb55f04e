"""Rows of all layers of a cache together: `GrowingRows`, or `FixedRows` of one capacity.

    PagedCache ─► GrowingRows   a block table for each kind of layer; rows share blocks, and end where they like
              └─► FixedRows     one table that never changes; lengths live on the device, with each layer

The cache has one of the two and asks it no further. Neither holds a layer or the cache: what they change is handed in.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, Self

from hf_kvopt.cache.fixed import FixedLayer
from hf_kvopt.cache.fixed_sealed import FixedSealedLayer
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import CacheStateError
from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.pool.ahead import AheadTable
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.chunked import ChunkedTable
from hf_kvopt.pool.evicting import EvictingTable
from hf_kvopt.pool.scored import ScoredTable
from hf_kvopt.pool.tail import Tails
from hf_kvopt.quant import FormatPolicy, KVFormat

Layers = Sequence[PagedLayer]
Kind = int | str | EvictionPolicy | None
"""What layers with one table have in common: a window, none, a policy of their own, or that they seal blocks."""
_SEALED = "sealed"


class TableMaker(NamedTuple):
    """Makes tables over block spaces of their own."""

    config: CacheConfig
    policy: EvictionPolicy | None = None  # of tables without a window
    formats: FormatPolicy = FormatPolicy()

    def __call__(self, window: int | None, policy: EvictionPolicy | None = None) -> BlockTable:
        """Make the table of all layers with this window, or none; `policy` is one of single layers."""
        allocator = BlockAllocator(self.config.max_blocks, block_size=self.config.block_size)
        if self.formats.seals(window is not None) and not self.config.compileable:
            allocator.tails = Tails()
        policy = policy or self.policy
        if policy is not None and window is None:
            scored = ChunkedTable if policy.shrinks_chunks else ScoredTable
            kind = scored if policy.scores_prompts else EvictingTable
            return kind(allocator, self.config.block_size, policy)
        return BlockTable(allocator, self.config.block_size, window)

    def ahead(self) -> AheadTable:
        """Make the table of all layers of fixed capacity that seal their blocks."""
        allocator = BlockAllocator(self.config.max_blocks, block_size=self.config.block_size)
        allocator.tails = Tails()
        return AheadTable(allocator, self.config.block_size)


class MakesTables(Protocol):
    """Whoever gives a table to the layers with a window (or none)."""

    def __call__(self, window: int | None, policy: EvictionPolicy | None = None) -> BlockTable:
        """Make the table."""
        ...


class GrowingRows:
    """Block tables by window, or by the policy of single layers, each for all layers of a kind.

    Args:
        make_table: makes a table when the first layer of its kind asks.
        lock: held while a step is undone, where other threads change the same blocks.
    """

    is_fixed = False

    def __init__(self, make_table: MakesTables, lock: AbstractContextManager[Any] | None = None) -> None:
        self.make_table = make_table
        self.lock = lock if lock is not None else contextlib.nullcontext()
        self.tables: dict[Kind, BlockTable] = {}

    def make_layer(
        self, window: int | None, policy: EvictionPolicy | None, format: KVFormat, exact_prefill: bool
    ) -> PagedLayer:
        """Make a layer of keys and values over the table of its kind."""
        return PagedLayer(self.table_for(window, policy), format, exact_prefill)

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 while nothing is held."""
        return max((table.batch_size for table in self.tables.values()), default=0)

    @property
    def clock(self) -> int:
        """Columns that were appended, as far as any layer has come."""
        return max((table.clock for table in self.tables.values()), default=0)

    def table_for(self, window: int | None, policy: EvictionPolicy | None = None) -> BlockTable:
        """The table that all layers with a window (or none), or with an equal policy of their own, share."""
        kind = window if policy is None else policy
        if kind not in self.tables:
            made = self.make_table(window) if policy is None else self.make_table(window, policy)
            made.kind = kind
            self.tables[kind] = made
        return self.tables[kind]

    def table_like(self, table: BlockTable) -> BlockTable:
        """The table of layers that have `table` in other rows, or had it here before all was given back."""
        return self.table_for(table.window, table.kind if isinstance(table.kind, EvictionPolicy) else None)

    def owns(self, layer: PagedLayer) -> bool:
        """Return whether a layer's rows are these."""
        return self.tables.get(layer.table.kind) is layer.table

    def lengths(self, table: BlockTable, layers: Layers) -> list[int]:
        """Tokens of each row of one table."""
        return table.lengths

    def crop(self, num_tokens: int, layers: Layers) -> None:
        """Remove the last `num_tokens` tokens of every row; see `PagedCache.crop`."""
        for table in self._live():
            table.crop(num_tokens)
        self._sync(layers)

    def require_croppable(self, num_tokens: int) -> None:
        """Raise CacheStateError unless `crop(num_tokens)` can be done."""
        for table in self._live():
            table.require_croppable(num_tokens)

    def crop_rows(self, lengths: Sequence[int], layers: Layers) -> None:
        """Cut row i down to `lengths[i]` tokens; see `PagedCache.crop_rows`."""
        for table in self._live():
            table.require_rows_croppable(lengths)
        for table in self._live():
            table.crop_rows(lengths)
        self._sync(layers)

    def keep(self, num_tokens: int, paths: Sequence[Sequence[int]], layers: Layers) -> None:
        """Keep those of the last tokens of each row that are on its path; see `PagedCache.keep_paths`."""
        for table in self._live():
            table.keep(num_tokens, paths)
        self._sync(layers)

    def select(self, indices: Sequence[int], layers: Layers) -> None:
        """Let row i be what row `indices[i]` was."""
        for table in self._live():
            table.select(indices)

    def reset(self, layers: Layers) -> None:
        """Forget all tokens and the batch size."""
        for table in self.tables.values():
            table.allocator.recount()
            table.clear()
        self._sync(layers)

    def undo(self, clock: int, layers: Layers) -> None:
        """Undo a forward that was refused, or of which only some layers were written, back to column `clock`."""
        with self.lock:
            for table in self.tables.values():
                table.rollback(clock)
            self._sync(layers)

    def take_back(self, clock: int, layers: Layers) -> None:
        """Go back to what all layers hold, after a forward that stopped half way."""
        self.undo(clock, layers)

    def forget_tables(self) -> None:
        """Let go of all tables: forks keep the block spaces that they use."""
        self.tables = {}

    def fork(self) -> Self:
        """Make rows over the same blocks; whoever writes first copies the block that is written."""
        child = type(self)(self.make_table, self.lock)
        child.tables = {kind: table.fork() for kind, table in self.tables.items()}
        return child

    def _live(self) -> list[BlockTable]:
        return [table for table in self.tables.values() if table.rows]

    def _sync(self, layers: Layers) -> None:
        for layer in layers:
            # A layer that sat out some forwards stays behind by as much.
            layer.clock = min(layer.clock, layer.table.clock)
            if not layer.clock:
                layer.forget()


class FixedRows(GrowingRows):
    """Rows of one capacity, in one table that never changes: row r owns the r-th equal share of the blocks.

    All layers keep all tokens, those with a window too; each knows its length. Layers that seal their blocks have a
    table of their own, of equal capacity.
    """

    is_fixed = True

    make_table: TableMaker

    def make_layer(
        self, window: int | None, policy: EvictionPolicy | None, format: KVFormat, exact_prefill: bool
    ) -> PagedLayer:
        if format.sealed is not None:
            return FixedSealedLayer(self._sealed_table(), format, exact_prefill)
        return FixedLayer(self.table_for(None), format, exact_prefill)

    def table_for(self, window: int | None, policy: EvictionPolicy | None = None) -> BlockTable:
        return super().table_for(None)

    def table_like(self, table: BlockTable) -> BlockTable:
        return self._sealed_table() if isinstance(table, AheadTable) else self.table_for(None)

    def _sealed_table(self) -> AheadTable:
        table = self.tables.get(_SEALED)
        if not isinstance(table, AheadTable):
            table = self.make_table.ahead()
            table.kind = _SEALED
            self.tables[_SEALED] = table
        return table

    def lengths(self, table: BlockTable, layers: Layers) -> list[int]:
        lengths = [layer.held for layer in self._fixed(layers) if layer.table is table]
        return [max(0, max(lengths, default=0) - lag) for lag in table.lags]

    def require_croppable(self, num_tokens: int) -> None:
        """Any number can be removed: more than are held leave none."""

    def crop(self, num_tokens: int, layers: Layers) -> None:
        for layer in self._fixed(layers):
            layer.set_length(max(0, layer.held - num_tokens))

    def crop_rows(self, lengths: Sequence[int], layers: Layers) -> None:
        raise CacheStateError(
            "crop_rows needs a growing cache of attention layers alone: got one of fixed capacity, or with states "
            "that have no token axis; use crop"
        )

    def keep(self, num_tokens: int, paths: Sequence[Sequence[int]], layers: Layers) -> None:
        if any(list(path) != list(paths[0]) for path in paths):
            raise CacheStateError(
                f"rows of a cache of fixed capacity keep the same tokens: got {[list(path) for path in paths]}; "
                "use PagedCache without compileable=True"
            )
        for layer in self._fixed(layers):
            layer.keep(num_tokens, paths[0])

    def select(self, indices: Sequence[int], layers: Layers) -> None:
        for layer in self._fixed(layers):
            layer.select_rows(list(indices))

    def reset(self, layers: Layers) -> None:
        for layer in self._fixed(layers):
            layer.set_length(0)
            layer.forget()

    def undo(self, clock: int, layers: Layers) -> None:
        for layer in self._fixed(layers):
            if int(layer.length) > clock:
                layer.set_length(clock)

    def take_back(self, clock: int, layers: Layers) -> None:
        for layer in self._fixed(layers):
            layer.set_length(clock)

    def fork(self) -> Self:
        """Make rows with memory of their own: addresses are fixed, so nothing can be shared."""
        return type(self)(self.make_table, self.lock)

    def _fixed(self, layers: Layers) -> list[FixedLayer]:
        return [layer for layer in layers if isinstance(layer, FixedLayer)]


class CacheStep:
    """The step guard of one cache: how whoever reads what was just written has it taken back in all tables.

    Args:
        rows: of the cache.
        layers: of the cache, the very list.

    The cache holds it, and handles do; no layer or table does, so that a dropped cache is freed at once.
    """

    def __init__(self, rows: GrowingRows, layers: list[Any]) -> None:
        self.rows, self.layers = rows, layers

    def undo(self, table: BlockTable) -> None:
        """Go back to where the step that was last reserved in `table` began."""
        self.undo_to(table.step_start)

    def undo_to(self, clock: int) -> None:
        """Go back to column `clock`, of a forward that was refused or of which only some layers were written."""
        self.rows.undo(clock, [layer for layer in self.layers if isinstance(layer, PagedLayer)])
