"""Rows of unlike lengths give back what lies behind their own window."""

import pytest

from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.ragged import join, release_behind

BLOCK, WINDOW = 16, 32


def ragged(*lengths: int, max_blocks: int | None = None) -> BlockTable:
    """A table of a sliding layer that frees nothing by itself, with rows of these lengths that end together."""
    allocator = BlockAllocator(max_blocks, stays_put=True)
    tables = []
    for length in lengths:
        table = BlockTable(allocator, BLOCK, WINDOW)
        table.keeps_all = True
        table.reserve(1, length)
        tables.append(table)
    for other in tables[1:]:
        join(tables[0], other)
    return tables[0]


def own_blocks(table: BlockTable) -> list[int]:
    return [len(row) - table.holes.count(row) for row in table.rows]


def test_a_long_row_beside_a_short_one_keeps_three_blocks() -> None:
    table = ragged(200, 20)
    assert own_blocks(table) == [13, 2]
    release_behind(table)
    assert own_blocks(table) == [3, 2]
    assert table.allocator.num_blocks - table.allocator.num_free == 3 + 2 + 1
    table.allocator.check_integrity()


@pytest.mark.parametrize("length", range(WINDOW, WINDOW + 2 * BLOCK + 1))
def test_every_token_that_the_next_query_sees_stays(length: int) -> None:
    table = ragged(length, 3)
    held = list(table.rows[0])
    release_behind(table)
    first = length - WINDOW + 1  # of those that a query at position `length` sees
    assert table.rows[0][first // BLOCK :] == held[first // BLOCK :]
    assert table.holes.count(table.rows[0]) == first // BLOCK


def test_rows_grow_leave_and_join_over_holes_without_losing_a_block() -> None:
    table = ragged(100, 20, 60)
    for clock in range(100, 150):
        table.reserve(3, clock)
        release_behind(table)
        table.allocator.check_integrity()
    table.select([1, 2])
    table.keep(0, [[], []])
    assert own_blocks(table)[1] <= 3
    joined = BlockTable(table.allocator, BLOCK, WINDOW)
    joined.keeps_all = True
    joined.reserve(1, 90)
    join(table, joined)
    release_behind(table)
    table.allocator.check_integrity()
    table.clear()
    assert table.allocator.num_free == table.allocator.num_blocks


def test_nothing_is_won_where_others_hold_the_blocks_and_none_is_free() -> None:
    table = ragged(96, max_blocks=6)
    table.allocator.retain(table.rows[0])
    before = list(table.rows[0])
    release_behind(table)
    assert table.rows[0] == before
    table.allocator.release(before)
    release_behind(table)
    assert own_blocks(table) == [2]
    table.allocator.check_integrity()


def test_a_full_table_keeps_everything() -> None:
    table = BlockTable(BlockAllocator(), BLOCK)
    table.reserve(1, 200)
    release_behind(table)
    assert len(set(table.rows[0])) == 13
