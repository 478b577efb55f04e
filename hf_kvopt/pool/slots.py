"""Arithmetic on rows of blocks: where tokens lie in the pools, and whether rows can be seen as one strided tensor."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError

if TYPE_CHECKING:
    from hf_kvopt.pool.addresses import Addresses
    from hf_kvopt.pool.block_table import BlockTable


def column_slots(table: "Addresses", start: int, stop: int) -> list[list[int]]:
    """Slots of the columns `start` to `stop` of each row; -1 where it has no token."""
    size, slots = table.block_size, []
    for row, lag in zip(table.rows, table.lags, strict=True):
        first = table.base + lag  # the column of the row's first slot
        none = [-1] * (min(stop, first) - start)
        slots.append(none + [row[c // size] * size + c % size for c in range(max(start - first, 0), stop - first)])
    return slots


def picked(table: "Addresses", skip: int, num_columns: int, device: torch.device) -> Tensor:
    """[batch, num_columns] int64 slots from column base + `skip` on; some slot of the row where it has no token."""
    block_table, _, lags = table.rows_on(device)
    tokens = torch.arange(skip, skip + num_columns, device=device).expand(len(block_table), -1)
    if lags is not None:
        tokens = (tokens - lags[:, None]).clamp(min=0)
    blocks = block_table.long().gather(1, tokens // table.block_size)
    return blocks * table.block_size + tokens % table.block_size


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


def shared_places(table: "BlockTable", start: int, stop: int) -> list[tuple[int, int]]:
    """(row, index in the row) of shared blocks behind the columns `start` to `stop`; the last holder may keep one."""
    left: dict[int, int] = {}
    places = []
    for i, (row, lag) in enumerate(zip(table.rows, table.lags, strict=True)):
        first = table.base + lag  # the column of the row's first slot
        for j in range(
            max(0, start - first) // table.block_size, min(len(row), -(-(stop - first) // table.block_size))
        ):
            left.setdefault(row[j], table.allocator.refcounts[row[j]])
            if left[row[j]] > 1:
                left[row[j]] -= 1
                places.append((i, j))
    return places


def after_cut(table: "BlockTable", lengths: Sequence[int]) -> tuple[list[int], int]:
    """Lags and clock once row i of `table` has `lengths[i]` tokens; raises CacheStateError where it has fewer."""
    removed = [old - new for old, new in zip(table.lengths, lengths, strict=True)]
    if min(removed, default=0) < 0:
        raise CacheStateError(f"rows can only be cut: got {list(lengths)} tokens for rows that hold {table.lengths}")
    if min(lengths, default=0) < 0:
        raise CacheStateError(f"cannot crop to {min(lengths)} tokens: got a cache that holds {table.lengths}")
    clock = table.clock - min(removed, default=0)
    return [clock - length for length in lengths], clock


def padded_rows(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows at one length of a block at least, filled up with block 0: columns may be left that no row fills."""
    width = max([1, *map(len, rows)])
    return [[*row, *[0] * (width - len(row))] for row in rows]


def strided(x: Tensor, first: int, pitch: int, batch: int, length: int) -> Tensor:
    """[batch, num_kv_heads, length, ...] view of x [num_blocks, block_size, num_kv_heads, ...]: row r from slot
    first + r * pitch on."""
    _, slot, head, *tail = x.stride()
    _, _, num_heads, *sizes = x.shape
    return x.as_strided((batch, num_heads, length, *sizes), (pitch * slot, head, slot, *tail), first * slot)


def gathered(x: Tensor, slots: Tensor) -> Tensor:
    """[batch, num_kv_heads, kv_len, ...] of x [num_blocks, block_size, num_kv_heads, ...] at slots [batch, kv_len]."""
    heads_first = x.movedim(2, 0)
    if not heads_first.is_contiguous():
        return x.flatten(0, 1)[slots].transpose(1, 2)
    picked = heads_first.flatten(1, 2).index_select(1, slots.reshape(-1))
    return picked.unflatten(1, tuple(slots.shape)).transpose(0, 1)


def writable(x: Tensor) -> Tensor:
    """Return x, or a copy where it was made in inference mode and could not be written outside of it."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def shared_runs(src: list[int], dst: list[int]) -> list[tuple[int, int]]:
    """(first index, length) of the stretches in which both lists count up by one."""
    if not src:
        return []
    pairs = list(zip(src, dst, strict=True))
    cuts = [i + 1 for i, (p, q) in enumerate(pairwise(pairs)) if q[0] != p[0] + 1 or q[1] != p[1] + 1]
    bounds = [0, *cuts, len(pairs)]
    return [(a, b - a) for a, b in pairwise(bounds)]


def is_one_run(row: Sequence[int]) -> bool:
    """Whether the blocks of `row` follow each other in memory."""
    return row[-1] - row[0] == len(row) - 1 and row == list(range(row[0], row[-1] + 1))


# Block table [batch, max_blocks], tokens held [batch] and columns before the first one [batch], or None; all int32.
RowTensors = tuple[Tensor, Tensor, Tensor | None]


class Step(NamedTuple):
    """What one forward adds to a table, in columns; the same for all layers that have written as many."""

    start: int  # first column that is written: what a window drops at once is not
    stop: int
    kv_len: int  # columns that its queries are handed
    skip: int  # columns held before the first of those


class Memo:
    """Tensors made from the rows of a table, for all layers of a step; by what they are and the device they are on."""

    def __init__(self) -> None:
        self._known: dict[tuple, Tensor] = {}

    def get(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """What is known as `key`, or what `make` gives."""
        tensor = self._known.get(key)
        if tensor is None:
            tensor = self._known[key] = make()
        return tensor

    def of(self, key: tuple, data: Callable[[], list], dtype: torch.dtype) -> Tensor:
        """The same for numbers, on the device `key[1]`."""
        return self.get(key, lambda: torch.tensor(data(), dtype=dtype, device="cpu").to(key[1], non_blocking=True))

    def forget(self, name: str) -> None:
        """Drop what has `name` in its key."""
        self._known = {key: tensor for key, tensor in self._known.items() if name not in key}

    def forget_all_but(self, name: str) -> None:
        """Drop what does not have `name` first in its key."""
        self._known = {key: tensor for key, tensor in self._known.items() if key[0] == name}


class Layout:
    """How rows of blocks lie in memory; valid until a row changes."""

    def __init__(self, rows: Sequence[Sequence[int]], block_size: int) -> None:
        self.rows, self.block_size = rows, block_size

    @cached_property
    def pitch(self) -> tuple[int, int] | None:
        """(first slot of row 0, slots from row to row) where rows are each one run, evenly spaced; else None."""
        rows = self.rows
        if not rows or not all(rows) or not all(is_one_run(row) for row in rows):
            return None
        pitch = rows[1][0] - rows[0][0] if len(rows) > 1 else 0
        if pitch < 0 or any(b[0] - a[0] != pitch for a, b in pairwise(rows)):
            return None
        return rows[0][0] * self.block_size, pitch * self.block_size

    @cached_property
    def runs(self) -> list[list[tuple[int, int]]]:
        """(first slot, slots) of the stretches of memory that make up each row."""
        return [_runs(row, self.block_size) for row in self.rows]


def _runs(row: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(row)) if b != a + 1), len(row)]
    return [(row[i] * block_size, (j - i) * block_size) for i, j in pairwise(cuts) if j > i]
