"""AheadTable: rows of fixed capacity over sealed blocks, with blocks and exact places that are handed out ahead.

    row       block 0   block 1   ...   block i - 1   block i   block i + 1   block i + 2   ...
    place        a      (sealed)             b           c           d             b        ...

A compiled step changes no table: before it, `publish` gives each row all blocks of its capacity, and a cycle of exact
places in which a later block takes that of one whose exact form no token reads any more. Behind such steps the host
learns from the device how far they came (`resume`), and the table is a `BlockTable` like any other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.tail import Tails
from hf_kvopt.quant.sealed_formats import MAX_TAIL_BLOCKS

# Places that a row goes through: those of the block that is written, of the one before, and of one that a cut goes to.
_CYCLE = 3


class Cycle(NamedTuple):
    """Exact places of a row's blocks from `first` on, in turn."""

    first: int
    places: list[int]
    spare: list[int]  # of these, those that belong to no block so far

    def place(self, block: int) -> int:
        """Return the place of a block of the row."""
        return self.places[(block - self.first) % len(self.places)]


class AheadTable(BlockTable):
    """A table whose device tensors stay where they are.

    Between calls: `is_published` where the tensors say what the host knows, and steps on the device may go on.
    """

    capacity = 0  # columns of a row
    is_published = False
    cycles: list[Cycle]
    block_table: Tensor  # [batch, row_blocks] int32
    exact_places: Tensor  # [batch, row_blocks] int32
    lags_on: Tensor  # [batch] int64

    def prepare(self, batch: int, row_blocks: int, device: torch.device) -> None:
        """Take the memory of `batch` rows of `row_blocks` blocks, before a pool is made."""
        allocator, tails = self.allocator, self.allocator.tails
        assert tails is not None
        allocator.max_blocks, allocator.stays_put = batch * row_blocks, True
        allocator.extend(batch * row_blocks)
        tails.reserve(batch * MAX_TAIL_BLOCKS)
        self.capacity, self.cycles = row_blocks * self.block_size, []
        with torch.inference_mode(False):
            self.block_table, self.exact_places = torch.zeros(2, batch, row_blocks, dtype=torch.int32, device=device)
            self.lags_on = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that a step on the device reads of the rows."""
        return self.block_table, self.exact_places, self.lags_on

    def publish(self) -> None:
        """Let steps on the device go on from here: hand out what they will write, and tell the device."""
        if self.is_published or not self.rows:
            return
        self._keep_exact()
        self._extend_rows(self.capacity)
        self._tails.hold(self.allocator)
        self.cycles = [self._cycle(row) for row in range(len(self.rows))]
        num_columns = self.block_table.shape[1]
        places = [[0] * num_columns for _ in self.rows]
        for found, row, exact, cycle in zip(places, self.rows, self.exact, self.cycles, strict=True):
            found[cycle.first :] = [cycle.place(block) for block in range(cycle.first, num_columns)]
            for block in exact:
                found[block] = self._place_of(row[block])
        blocks = [row + [0] * (num_columns - len(row)) for row in self.rows]
        for tensor, numbers in zip(self.tensors, (blocks, places, self.lags), strict=True):
            tensor.copy_(torch.tensor(numbers, dtype=tensor.dtype), non_blocking=True)
        self.is_published = True

    def resume(self, clock: int) -> None:
        """Take over what steps on the device wrote, up to column `clock`, and change the table here again."""
        if not self.is_published:
            return
        self.is_published = False
        if clock > self.clock:
            self._follow(clock)
        for cycle in self.cycles:
            self._tails.put_back(cycle.spare)
        self._cut(self.lags, clock)
        self.clock = self.step_start = clock
        self._rows_changed()

    def begin_later(self, lags: Sequence[int]) -> None:
        """See `BlockTable`; what was handed out ahead is handed out anew."""
        was_published, start = self.is_published, self.step_start
        self.resume(self.clock)
        self.step_start = start
        super().begin_later(lags)
        if was_published:
            self.publish()

    def clear(self) -> None:
        """See `BlockTable`."""
        if self.is_published:
            self.resume(self.clock)
        super().clear()

    def select(self, indices: Sequence[int]) -> None:
        """Let row i be what row `indices[i]` was, in blocks of its own."""
        super().select(indices)
        self._tails.hold(self.allocator)
        self.unshare(0, self.clock)

    def become(self, other: "AheadTable") -> None:
        """Hold the rows of `other`, of equal capacity, by the same numbers in the block space of this empty table."""
        self.rows[:] = [list(row) for row in other.rows]
        self.lags, self.exact, self.cycles = list(other.lags), list(other.exact), list(other.cycles)
        self.clock, self.step_start, self.is_approximate = other.clock, other.step_start, other.is_approximate
        self.allocator.recount()
        self._tails.copy_from(other._tails)
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)
        self.is_published = other.is_published
        self._rows_changed()

    def fork(self) -> BlockTable:
        """Raise CacheStateError: addresses are fixed, so rows cannot share their blocks; see `become`."""
        raise CacheStateError("rows of fixed capacity cannot share blocks: got a fork; use copy.deepcopy(cache)")

    def _keep_exact(self) -> None:
        """Keep no block exact that a cut took, but for the first one of a row without a token."""
        size = self.block_size
        self.exact = [
            tuple(block for block in exact if block * size < max(1, length))
            for exact, length in zip(self.exact, self.lengths, strict=True)
        ]

    @property
    def _tails(self) -> Tails:
        assert self.allocator.tails is not None
        return self.allocator.tails

    def _place_of(self, number: int) -> int:
        return self._tails.places[number]

    def _cycle(self, row: int) -> Cycle:
        """Choose the places of a row's later blocks: those of its newest ones, and further ones where they are few."""
        exact, numbers = self.exact[row], self.rows[row]
        last = max(0, self.lengths[row] - 1) // self.block_size
        first = last + 1
        while first - 1 >= 1 and first - 1 in exact:
            first -= 1
        own = [self._place_of(numbers[block]) for block in range(first, last + 1)]
        spare = self._tails.take(max(0, _CYCLE - len(own)))
        return Cycle(first, [*own, *spare], spare)

    def _follow(self, clock: int) -> None:
        """Say which blocks have which places at column `clock`."""
        tails, spared = self._tails, []
        for i, (row, cycle) in enumerate(zip(self.rows, self.cycles, strict=True)):
            last = max(0, clock - self.lags[i] - 1) // self.block_size
            newest = range(max(cycle.first, last - len(cycle.places) + 1), last + 1)
            used = {row[block]: cycle.place(block) for block in newest}
            tails.forget([row[block] for block in self.exact[i] if block])
            tails.put_back(cycle.spare)
            spared.append(cycle._replace(spare=[]))
            for number, place in used.items():
                tails.assign(number, place)
            self.exact[i] = (0, *newest)
        self.cycles = spared
