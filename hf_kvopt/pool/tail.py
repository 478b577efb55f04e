"""Which blocks of a row are kept as the model computed them, beside the sealed form that all full blocks have.

    a query at position p, in block i = p // block_size, reads

        block      0         1 ... i - 2        i - 1, i
                 exact         sealed            exact

so what a token reads follows from positions alone, however the text came in. Where a policy dropped blocks of a row,
those that it has left are numbered on; its first one and its newest two are never dropped.

Exact blocks lie in a small storage of their own, found by the number of the block they belong to: rows that share a
block share both forms of it, and a block that is copied is copied in both. Between calls each row of a table has its
exact blocks: those that its next token reads, and while a step is young those to which a draft may be cut back.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_kvopt.kernels.sealed_kv import Full
from hf_kvopt.pool.live import LivePools
from hf_kvopt.quant.sealed_formats import tail_blocks

if TYPE_CHECKING:
    from hf_kvopt.pool.allocator import BlockAllocator
    from hf_kvopt.pool.block_table import BlockTable
    from hf_kvopt.pool.exact_rows import ExactRows


class Tails:
    """The exact blocks of one block space: where in the exact storage each of them lies.

    Owns the places of that storage; a place is free, or belongs to one block.
    """

    def __init__(self) -> None:
        self.places: dict[int, int] = {}  # by block
        self.capacity = 0
        self.pools = LivePools()  # whose exact storage these are the places of
        self._free: list[int] = []

    def forget(self, blocks: Iterable[int]) -> None:
        """Free the places of blocks that begin anew."""
        for block in blocks if self.places else ():
            place = self.places.pop(block, None)
            if place is not None:
                self._free.append(place)

    def renumber(self, new_ids: dict[int, int]) -> None:
        """Follow a relayout of the allocator; blocks without a new number are free."""
        self.forget([block for block in self.places if block not in new_ids])
        self.places = {new_ids[block]: place for block, place in self.places.items()}

    def hold(self, allocator: "BlockAllocator") -> list[int]:
        """Let the blocks that holders of the allocator want exact have a place, and no others.

        Returns:
            The blocks that had none.
        """
        wanted = {block for holder in list(allocator.holders) for block in getattr(holder, "exact_blocks", tuple)()}
        self.forget([block for block in self.places if block not in wanted])
        missing = [block for block in sorted(wanted) if block not in self.places]
        self.give(missing)
        return missing

    def give(self, blocks: Sequence[int]) -> None:
        """Give each of `blocks`, which have none, a place; the pools grow where there are too few."""
        lacking = len(blocks) - len(self._free)
        if lacking > 0:
            self.reserve(self.capacity + max(lacking, self.capacity // 8))
        for block in blocks:
            self.places[block] = self._free.pop()

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` exact blocks in all."""
        for pool in self.pools:
            pool.resize_tails(capacity)
        self._free += range(self.capacity, capacity)
        self.capacity = capacity

    def take(self, num_places: int) -> list[int]:
        """Hand out places that belong to no block yet; see `put_back`."""
        return [self._free.pop() for _ in range(num_places)]

    def put_back(self, places: Iterable[int]) -> None:
        """Take back places that belong to no block."""
        self._free += places

    def copy_from(self, other: "Tails") -> None:
        """Become equal to `other`, of the same capacity."""
        self.places, self._free = dict(other.places), list(other._free)

    def assign(self, block: int, place: int) -> None:
        """Give a block that has none a certain free place."""
        self._free.remove(place)
        self.places[block] = place

    def copied(self, src: Sequence[int], dst: Sequence[int]) -> list[tuple[int, int]]:
        """Places (from, to) to copy where block `src[i]` is copied to `dst[i]`, the same at every call."""
        pairs = [(a, b) for a, b in zip(src, dst, strict=True) if a in self.places]
        self.give([b for _, b in pairs if b not in self.places])
        return [(self.places[a], self.places[b]) for a, b in pairs]


def completed(table: "BlockTable | ExactRows", start: int, stop: int) -> list[tuple[int, int]]:
    """(row, block of the row) that become full by the columns `start` to `stop`, but for first blocks."""
    size, found = table.block_size, []
    for row, begin in enumerate(_begins(table)):
        first, last = max(1, (start - begin) // size), (stop - begin) // size
        if first < last:
            found += [(row, block) for block in range(max(first, table.first_block), last)]
    return found


def full_blocks(
    table: "BlockTable | ExactRows", full: Sequence[tuple[int, int]], start: int, stop: int, device: torch.device
) -> Full:
    """Return what `completed` found for the columns `start` to `stop`, whose states are given, as kernels take it."""
    known = table.memo.of(("full", device, start, stop, "exact"), lambda: _full_rows(table, full, start), torch.int64)
    return Full(*known.unbind())


def plan(table: "BlockTable | ExactRows", start: int, stop: int) -> None:
    """Give the blocks that a step over the columns `start` to `stop` needs exact a place."""
    tails = table.allocator.tails
    assert tails is not None
    begins = _begins(table)
    rows = [tail_blocks(max(0, start - begin), stop - begin, table.block_size) for begin in begins]
    if table.pins:
        rows = [
            tuple(sorted({*blocks, *(block for block in pins if block * table.block_size < stop - begin)}))
            for blocks, pins, begin in zip(rows, _pins(table), begins, strict=True)
        ]
    if stop != table.clock:  # a layer that is behind others of its kind, which go on from where they are
        rows = [tuple(sorted({*one, *two})) for one, two in zip(rows, _filled(table), strict=True)]
    if rows != table.exact or not all(block in tails.places for block in _numbers(table, rows)):
        table.exact = rows
        tails.hold(table.allocator)
        table.exact_changed()


def pin(table: "BlockTable | ExactRows", rows: Sequence[Iterable[int]]) -> None:
    """Keep blocks of each row exact for as long as it has them; of what is there already, those that still are."""
    tails, size = table.allocator.tails, table.block_size
    if tails is None:
        return
    lengths = _lengths(table) if len(table.rows) == len(rows) else [0] * len(rows)
    known = _filled(table) if len(table.rows) == len(rows) else [()] * len(rows)
    table.pins = [
        tuple(block for block in blocks if block * size >= length or block in exact)
        for blocks, length, exact in zip(rows, lengths, known, strict=True)
    ]


def settle(table: "BlockTable | ExactRows") -> None:
    """After a cut: keep what the next token of each row reads exact, and take it from the sealed form where it is gone.

    What was sealed is read as it is stored from then on, for queries to whom it would be exact: a loss that a text fed
    again does not have. It happens only where more is cut off than the last step brought.
    """
    tails = table.allocator.tails
    if tails is None or not table.rows:
        return
    lengths = _lengths(table)
    needed = [tail_blocks(length, length, table.block_size) for length in lengths]
    kept = [
        tuple(sorted({*now, *(block for block in old if block <= length // table.block_size)}))
        for now, old, length in zip(needed, _filled(table), lengths, strict=True)
    ]
    table.exact = kept
    lost = tails.hold(table.allocator)
    for pool in tails.pools if lost else ():
        pool.restore_tails(lost)
    table.is_approximate = table.is_approximate or bool(lost)
    table.exact_changed()


def join(table: "BlockTable | ExactRows", other: "BlockTable | ExactRows") -> None:
    """Let `table` keep exact what `other` does in rows of its own, which are about to come behind."""
    if table.allocator.tails is None:
        return
    table.exact = [*_filled(table), *_filled(other)]
    if table.pins or other.pins:
        table.pins = [*_pins(table), *_pins(other)]
    table.is_approximate = table.is_approximate or other.is_approximate


def numbers_of(table: "BlockTable | ExactRows") -> list[int]:
    """The blocks of `table` that are kept exact."""
    return _numbers(table, _filled(table))


def used_bytes(allocator: "BlockAllocator") -> int:
    """Return the bytes of the blocks that are in use, and of exact places that are."""
    tails = allocator.tails
    exact = 0 if tails is None else sum(pool.tail_bytes for pool in tails.pools)
    stored = sum(pool.num_bytes for pool in allocator.pools) - exact
    used = (allocator.num_blocks - allocator.num_free) * (stored // max(1, allocator.num_blocks))
    return used if tails is None else used + exact * len(tails.places) // max(1, tails.capacity)


def exact_table(table: "BlockTable | ExactRows", device: torch.device) -> Tensor:
    """Return [batch, max_blocks] int32: place of each block of `table.rows_on` in the exact storage; 0: none."""
    return table.memo.of(("table", device, "exact"), lambda: _padded_places(table), torch.int32)


def exact_slots(table: "BlockTable | ExactRows", start: int, stop: int, device: torch.device) -> Tensor:
    """Return [batch, stop - start] int64 slots of the exact storage for these columns; -1: not kept there."""
    return table.memo.of(("slots", device, start, stop, "exact"), lambda: _slots(table, start, stop), torch.int64)


def _filled(table: "BlockTable | ExactRows") -> list[tuple[int, ...]]:
    """The exact blocks of each row, none where they were never planned."""
    return table.exact if len(table.exact) == len(table.rows) else [()] * len(table.rows)


def _begins(table: "BlockTable | ExactRows") -> list[int]:
    """The column of each row's token 0."""
    return [table.origin + lag for lag in table.lags]


def _lengths(table: "BlockTable | ExactRows") -> list[int]:
    """Tokens of each row, counted from its token 0."""
    return [max(0, table.clock - begin) for begin in _begins(table)]


def _pins(table: "BlockTable | ExactRows") -> list[tuple[int, ...]]:
    """The pinned blocks of each row; rows that were repeated have those of the row that they repeat."""
    if not table.pins:
        return [()] * len(table.rows)
    repeats, rest = divmod(len(table.rows), len(table.pins))
    return [pins for pins in table.pins for _ in range(repeats)] if not rest else [()] * len(table.rows)


def _numbers(table: "BlockTable | ExactRows", rows: Sequence[Sequence[int]]) -> list[int]:
    first = table.first_block
    return [
        row[block - first]
        for row, blocks in zip(table.rows, rows, strict=True)
        for block in blocks
        if 0 <= block - first < len(row)
    ]


def _full_rows(table: "BlockTable | ExactRows", full: Sequence[tuple[int, int]], start: int) -> list[list[int]]:
    """The fields of `Full`, one list each."""
    places: Any = table.allocator.tails.places  # type: ignore[union-attr]
    size, begins = table.block_size, _begins(table)
    numbers = [table.rows[row][block - table.first_block] for row, block in full]
    firsts = [block * size - (start - begins[row]) for row, block in full]
    held = [places.get(number, -1) for number in numbers]
    # Columns of states are read where there is no place alone.
    return [numbers, held, [row for row, _ in full], [max(0, first) for first in firsts]]


def _padded_places(table: "BlockTable | ExactRows") -> list[list[int]]:
    places: Any = table.allocator.tails.places  # type: ignore[union-attr]
    width = max([1, *map(len, table.rows)])
    return [[places.get(block, 0) for block in row] + [0] * (width - len(row)) for row in table.rows]


def _slots(table: "BlockTable | ExactRows", start: int, stop: int) -> list[list[int]]:
    places: Any = table.allocator.tails.places  # type: ignore[union-attr]
    size, first, slots = table.block_size, table.first_block, []
    for row, begin, exact in zip(table.rows, _begins(table), _filled(table), strict=True):
        held = [block for block in exact if 0 <= block - first < len(row)]
        firsts = {block: places[row[block - first]] * size for block in held}
        tokens = range(start - begin, stop - begin)
        slots.append([firsts[t // size] + t % size if t >= 0 and t // size in firsts else -1 for t in tokens])
    return slots
