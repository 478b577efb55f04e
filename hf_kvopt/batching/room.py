"""Room: whether the blocks that a forward will take are there, counted before it starts.

    needed      of each block space: what `reserve` takes for the columns to come, and copies of shared last blocks
    to be had   free blocks, room to grow up to the cap, and blocks of known texts that nobody else holds

A forward over several caches must not run out of blocks half way, as its tokens would be lost in some layers alone. So
everything is counted, over all caches of the forward, and taken only where it fits.
"""

from collections.abc import Iterable, Sequence

from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.prefix.batch import BatchCache
from hf_kvopt.prefix.store import PrefixStore

Blocks = list[int]
"""Blocks in each block space of a store, in the order of `PrefixStore.allocators`."""


class Room:
    """Counts the blocks of one store; whoever asks holds its lock.

    Args:
        store: whose blocks.
    """

    def __init__(self, store: PrefixStore) -> None:
        self.store = store

    def needed(self, cache: BatchCache, num_tokens: int) -> Blocks:
        """Blocks that `num_tokens` more tokens of each row of a cache take."""
        return [blocks_needed(table, num_tokens) for table in cache.tables]

    def for_text(self, num_tokens: int) -> Blocks:
        """Blocks that a text of `num_tokens` takes where nothing of it is known."""
        return [self.blocks(num_tokens)] * len(self.store.allocators)

    def blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.store.block_size)

    def has(self, wanted: Blocks) -> bool:
        """Tell whether so many blocks can be had now; nothing is evicted for the answer."""
        spaces = list(zip(self.store.allocators, wanted, strict=True))
        for allocator, _ in spaces:
            allocator.reclaim()
        missing = [
            0 if allocator.num_available is None else max(0, number - allocator.num_available)
            for allocator, number in spaces
        ]
        return not any(missing) or self.store.index.num_evictable >= max(missing)

    def take(self, wanted: Blocks) -> None:
        """Make so many blocks free, evicting known texts where that is needed.

        Raises:
            OutOfBlocks: they cannot be had.
        """
        for allocator, number in zip(self.store.allocators, wanted, strict=True):
            allocator.ensure_free(number)


def blocks_needed(table: BlockTable, num_tokens: int) -> int:
    """Blocks that a table takes from its allocator for `num_tokens` more columns, copies of shared blocks included."""
    if not table.rows:
        return -(-num_tokens // table.block_size)
    ends = zip(table.lengths, table.rows, strict=True)
    grown = sum(max(0, -(-(length + num_tokens) // table.block_size) - len(row)) for length, row in ends)
    return grown + table.num_shared(table.clock, table.clock + 1)


def total(parts: Iterable[Sequence[int]], num_spaces: int) -> Blocks:
    """Sum of block counts, space by space."""
    sums = [0] * num_spaces
    for part in parts:
        sums = [a + b for a, b in zip(sums, part, strict=True)]
    return sums
