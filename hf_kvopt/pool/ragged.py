"""Operations on tables whose rows come and go one by one: join rows, give back what single rows need no more."""

from hf_kvopt.pool import tail
from hf_kvopt.pool.block_table import BlockTable


def join(table: BlockTable, other: BlockTable) -> None:
    """Take the rows of `other`, over the same blocks, behind those of `table` and empty it; all end together."""
    assert table.allocator is other.allocator
    assert table.base == other.base == 0
    table._drop_retired()
    tail.join(table, other)
    clock = max(table.clock, other.clock)
    table.lags = [lag + clock - each.clock for each in (table, other) for lag in each.lags]
    table.rows += [list(row) for row in other.rows]
    other.rows.clear()
    other.clear()
    table.clock = table.step_start = clock
    table._rows_changed()


def release_behind(table: BlockTable) -> None:
    """Give back, row by row, the blocks that lie wholly behind the window of the row's next query; see `Holes`."""
    if table.window is not None and not table.record_past:
        counts = [max(0, length - table.base - table.window + 1) // table.block_size for length in table.lengths]
        if table.holes.release(table.rows, counts):
            table._rows_changed()
