"""Statistics of a paged cache, counted from its tables and pools."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.cache.rows import GrowingRows
from hf_kvopt.pool import tail
from hf_kvopt.pool.block_table import BlockTable


class CacheStats(NamedTuple):
    """A snapshot of a cache; blocks and tokens summed over its tables, bytes over its layers.

    `used_blocks` counts a shared block once, `shared_blocks` those that more than one row (or fork) holds.
    `waste_tokens` is the tail slack: slots of used blocks that hold no token. `used_bytes` are those of used blocks,
    `reserved_bytes` all that the allocator was asked for. `num_tokens` are the tokens of the rows, shared ones
    counted for each row. `dense_fallbacks` counts the times that some operation needed a gathered copy. `evicted` are
    the tokens that an eviction policy dropped since the last reset, over all rows.
    """

    num_blocks: int
    used_blocks: int
    shared_blocks: int
    free_blocks: int
    num_tokens: int
    waste_tokens: int
    used_bytes: int
    reserved_bytes: int
    dense_fallbacks: int
    evicted: int


class PrefixStats(NamedTuple):
    """Counts since the store was made, and what it holds now.

    `rows` prompts were looked up, `hits` of them found something; `hit_tokens` of their `prompt_tokens` were there.
    `evictions` counts blocks. `used_bytes` are those of blocks that the tree or a cache holds, `reserved_bytes` all.
    Blocks that were `spilled` have a copy in a tier, `restored` ones came back from there; `host_bytes` and
    `disk_bytes` are what the tiers hold. Where layers hold recurrent or convolution states, `checkpoints` counts the
    places in texts from which a prompt can go on, and `state_bytes` what their states take beside the blocks.
    """

    rows: int
    hits: int
    prompt_tokens: int
    hit_tokens: int
    evictions: int
    num_blocks: int
    used_bytes: int
    reserved_bytes: int
    spilled: int = 0
    restored: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    checkpoints: int = 0
    state_bytes: int = 0


def measure(rows: GrowingRows, layers: Sequence[PagedLayer]) -> CacheStats:
    """Count what the tables of `rows` and the pools of `layers` hold; nothing is changed."""
    pools = [pool for layer in layers for pool in layer.pools]
    num_blocks = used = shared = tokens = waste = used_bytes = 0
    for table in rows.tables.values():
        alloc = table.allocator
        alloc.reclaim()
        held = {block for row in table.held_rows() for block in row}
        num_blocks += alloc.num_blocks
        used += alloc.num_blocks - alloc.num_free
        shared += sum(alloc.refcounts[block] > 1 for block in held)
        lengths = rows.lengths(table, layers)
        tokens += sum(length - table.base for length in lengths)
        waste += _tail_slack(table, lengths)
        used_bytes += tail.used_bytes(alloc)
    return CacheStats(
        num_blocks=num_blocks,
        used_blocks=used,
        shared_blocks=shared,
        free_blocks=num_blocks - used,
        num_tokens=tokens,
        waste_tokens=waste,
        used_bytes=used_bytes,
        reserved_bytes=sum(pool.num_bytes for pool in pools),
        dense_fallbacks=sum(pool.reads.num_fallbacks for pool in pools),
        evicted=sum(table.evicted for table in rows.tables.values()),
    )


def _tail_slack(table: BlockTable, lengths: Sequence[int]) -> int:
    """Slots without a token in the last blocks; a last block that rows share counts once, by its fullest row."""
    filled: Counter[int] = Counter()
    for row, length in zip(table.rows, lengths, strict=True):
        if row:
            filled[row[-1]] = max(filled[row[-1]], length - table.base - (len(row) - 1) * table.block_size)
    return sum(table.block_size - count for count in filled.values())
