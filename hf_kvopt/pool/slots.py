"""Arithmetic on rows of blocks: where tokens lie in the pools, and whether rows can be seen as one strided tensor."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_kvopt.pool.block_table import BlockTable


def column_slots(table: "BlockTable", start: int, stop: int) -> list[list[int]]:
    """Slots of the columns `start` to `stop` of each row; -1 where it has no token."""
    size, slots = table.block_size, []
    for row, lag in zip(table.rows, table.lags, strict=True):
        first = table.base + lag  # the column of the row's first slot
        none = [-1] * (min(stop, first) - start)
        slots.append(none + [row[c // size] * size + c % size for c in range(max(start - first, 0), stop - first)])
    return slots


def moved_slots(table: "BlockTable", num_tokens: int, paths: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(from, to) slots where of the last `num_tokens` tokens of row i those numbered in `paths[i]` close up."""
    size, src, dst = table.block_size, [], []
    for row, length, path in zip(table.rows, table.lengths, paths, strict=True):
        first = length - num_tokens - table.base
        for place, node in enumerate(path):
            if node != place:
                src.append(row[(first + node) // size] * size + (first + node) % size)
                dst.append(row[(first + place) // size] * size + (first + place) % size)
    return src, dst


def is_one_run(row: Sequence[int]) -> bool:
    """Whether the blocks of `row` follow each other in memory."""
    return row[-1] - row[0] == len(row) - 1 and row == list(range(row[0], row[-1] + 1))


def even_pitch(rows: Sequence[Sequence[int]], block_size: int) -> tuple[int, int] | None:
    """(first slot of the first row, slots from row to row) of rows that are each one run, evenly spaced; else None."""
    if not rows or not all(rows) or not all(is_one_run(row) for row in rows):
        return None
    pitch = rows[1][0] - rows[0][0] if len(rows) > 1 else 0
    if pitch < 0 or any(b[0] - a[0] != pitch for a, b in pairwise(rows)):
        return None
    return rows[0][0] * block_size, pitch * block_size
