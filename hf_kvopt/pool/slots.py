"""Arithmetic on rows of blocks: where tokens lie in the pools, and whether rows can be seen as one strided tensor."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


def padded_rows(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows at one length of a block at least, filled up with block 0: columns may be left that no row fills."""
    width = max([1, *map(len, rows)])
    return [[*row, *[0] * (width - len(row))] for row in rows]


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
    """Return whether the blocks of `row` follow each other in memory."""
    return row[-1] - row[0] == len(row) - 1 and row == list(range(row[0], row[-1] + 1))


class Step(NamedTuple):
    """Step of a table: what one forward adds, in columns; the same for all layers that have written as many."""

    start: int  # first column that is written: what a window drops at once is not
    stop: int
    kv_len: int  # columns that its queries are handed
    skip: int  # columns held before the first of those


class Memo:
    """Tensors made from the rows of a table, for all layers of a step; by what they are and the device they are on."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def get(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """Return what is known as `key`, or what `make` gives."""
        tensor = self._known.get(key)
        if tensor is None:
            tensor = self._known[key] = make()
        return tensor

    def of(self, key: tuple[Any, ...], data: Callable[[], list[Any]], dtype: torch.dtype) -> Tensor:
        """Return the numbers known as `key`, or those that `make` gives, on the device `key[1]`."""
        return self.get(key, lambda: torch.tensor(data(), dtype=dtype, device="cpu").to(key[1], non_blocking=True))

    def forget(self, name: str) -> None:
        """Drop what has `name` in its key."""
        self._known = {key: tensor for key, tensor in self._known.items() if name not in key}

    def forget_all_but(self, name: str) -> None:
        """Drop what does not have `name` first in its key."""
        self._known = {key: tensor for key, tensor in self._known.items() if key[0] == name}


class RowLayout:
    """Layout of rows of blocks in memory; valid until a row changes."""

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
