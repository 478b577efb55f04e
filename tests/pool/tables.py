"""A table with one pool behind it, small enough to look at."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.storage import KVPool

BLOCK = 4


class Store(NamedTuple):
    """One table over one pool, and the allocator of both."""

    allocator: BlockAllocator
    table: BlockTable
    pool: KVPool

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.allocator.num_blocks - self.allocator.num_free


def make_store(window: int | None = None, max_blocks: int | None = None, extent: int = 3) -> Store:
    """Build an empty store with one head of one number a token."""
    allocator = BlockAllocator(max_blocks=max_blocks, extent=extent)
    states = torch.zeros(1, 1, 0, 1)
    pool = KVPool(states, states, BLOCK, 0)
    allocator.pools.append(pool)
    return Store(allocator, BlockTable(allocator, BLOCK, window), pool)


def append(store: Store, tokens: list[list[int]], table: BlockTable | None = None) -> None:
    """Append one list of tokens a row (all of one length) to `table` or the store's own."""
    table = table if table is not None else store.table
    start = table.clock
    table.reserve(len(tokens), table.clock + len(tokens[0]))
    skipped = max(0, table.base - start)
    states = torch.tensor(tokens, dtype=torch.float32)[:, None, skipped:, None]
    store.pool.write(states, states, table, start + skipped, start + len(tokens[0]))


def read(store: Store, table: BlockTable | None = None) -> list[list[int]]:
    """Read what each row holds, from the table's base on."""
    table = table if table is not None else store.table
    keys: Tensor = store.pool.keys.read(table, table.clock - table.base)
    starts = (keys.shape[2] - max(0, n - table.base) for n in table.lengths)
    return [row[0, start:, 0].int().tolist() for row, start in zip(keys, starts, strict=True)]
