"""EvictingTable: a block table that gives whole blocks back from the middle of its rows, as an eviction policy says.

    tokens of a row     0 .. 15   16 ......... 79   80 ... 95   96 ... 99          blocks of 16
    blocks held           [7]         given back        [12]        [3]            numbers [0, 5, 6]
    columns handed out   64 .. 79                     80 ... 95   96 ... 99        base 64, clock 100

The clock goes on counting all columns, so masks, positions and lengths are those of the whole text. What is held is
handed out as if it stood together at the end: the columns from `base` on. Queries come behind all of it and keys were
rotated before they were stored, so attention does not see the difference.

Blocks that are sealed are read by their number in the row, as if nothing stood between them: of such a row the first
block and the newest two are never dropped, which are read exact.

A forward that begins at column c finds what the policy keeps of c tokens, and its own tokens: blocks are dropped when
a forward begins, never behind one that may still be taken back. Rows count their tokens behind their padding.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.slots import Step


class Eviction(NamedTuple):
    """Blocks that the next forward drops before it begins."""

    removed: list[int]  # tokens and padding that each row loses
    columns: int  # that are handed out no longer
    kept: Sequence[list[int]] = ()  # for each row the numbers of the blocks that stay
    asked: Sequence[int] = ()  # lengths at which the policy said so


class EvictingTable(BlockTable):
    """Block table that drops what `policy` names; see `BlockTable` for the rest.

    Between calls: `block_numbers[i]` says which block of its text each block of row i holds, ascending, and `pads[i]`
    how many slots of padding the row begins with. Rows with padding lose it with the first eviction of any row.

    Args:
        allocator: the block space, shared with forks of this table.
        block_size: tokens a block.
        policy: what to drop.
    """

    policy: EvictionPolicy  # never None here
    block_numbers: list[list[int]]
    pads: list[int]
    _asked: list[int]  # lengths at which the policy was asked last

    def __init__(self, allocator: BlockAllocator, block_size: int, policy: EvictionPolicy) -> None:
        super().__init__(allocator, block_size)
        policy.check(block_size)
        self.policy = policy
        self._plan: tuple[int, Eviction | None] | None = None  # the version that it was made at
        self._forget()

    @property
    def origin(self) -> int:
        return self.base

    def visible_start(self, clock: int) -> int:
        return self.base

    def next_start(self, clock: int) -> int:
        eviction = self._next() if clock == self.clock else None
        return self.base + (0 if eviction is None else eviction.columns)

    def starts(self, skip: int, num_columns: int) -> list[int] | None:
        return [min(num_columns, max(0, lag - skip)) for lag in self.lags] if self.is_ragged else None

    def advance(self, batch_size: int, clock: int, num_tokens: int) -> Step:
        """See `BlockTable.advance`.

        Raises:
            UnsupportedModel: also where a layer does not go on where the others do.
        """
        is_known = self._step is not None and self._step[0] == (batch_size, clock, num_tokens)
        if not is_known and clock == self.clock:
            if num_tokens and batch_size == self.batch_size:
                self._evict(num_tokens)
        elif not is_known and (clock, clock + num_tokens) != (self.step_start, self.clock):
            raise UnsupportedModel(
                f"{self.policy} drops tokens that all layers hold alike: got a layer that goes on from column {clock} "
                f"to {clock + num_tokens} where others hold {self.clock} (cross attention, or an early exit); use the "
                "cache without a policy"
            )
        return super().advance(batch_size, clock, num_tokens)

    def note_padding(self, hidden: Sequence[int]) -> None:
        """Learn how many of the columns that are handed out now each row begins with are padding.

        Raises:
            CacheStateError: a row hides tokens behind which some were dropped already.
        """
        pads = [max(0, count - lag) for count, lag in zip(hidden, self.lags, strict=True)]
        if pads == self.padding():
            return
        for row, count in enumerate(pads):
            if count and self._num_dropped(row):
                raise CacheStateError(
                    f"attention_mask hides the first {count} tokens of row {row} that are held: got a row of which "
                    f"{self.policy} dropped tokens already; keep the mask as it was while they were read"
                )
        self.pads, self._plan, self._asked = pads, None, []

    def select(self, indices: Sequence[int]) -> None:
        self._follow()
        self.block_numbers = [list(self.block_numbers[i]) for i in indices]
        self.pads = [self.padding()[i] for i in indices]
        self._asked = []
        super().select(indices)

    def fork(self) -> BlockTable:
        child = super().fork()
        assert isinstance(child, EvictingTable)
        child.block_numbers, child.pads = [list(row) for row in self.block_numbers], list(self.pads)
        child.evicted = self.evicted
        return child

    def clear(self) -> None:
        super().clear()
        self._forget()

    def _forget(self) -> None:
        self.block_numbers, self.pads, self._asked = [], [], []
        self._plan, self.evicted = None, 0

    def _empty_twin(self) -> BlockTable:
        return type(self)(self.allocator, self.block_size, self.policy)

    def padding(self) -> list[int]:
        """Slots of padding at the beginning of each row; a row never has more than it holds."""
        pads = self.pads or [0] * self.batch_size
        return [min(count, self._num_held(row)) for row, count in enumerate(pads)]

    def _num_held(self, row: int) -> int:
        return max(0, self.clock - self.lags[row] - self.base)

    def _num_dropped(self, row: int) -> int:
        """Tokens that the policy dropped from a row."""
        numbers = self.block_numbers[row] if row < len(self.block_numbers) else []
        return (numbers[-1] + 1 - len(numbers)) * self.block_size if numbers else 0

    def _follow(self) -> None:
        """Let the block numbers follow what was appended and cropped since; neither reaches into a hole."""
        self.block_numbers += [[] for _ in range(self.batch_size - len(self.block_numbers))]
        for numbers, row in zip(self.block_numbers, self.rows, strict=True):
            del numbers[len(row) :]
            first = numbers[-1] + 1 if numbers else 0
            numbers += range(first, first + len(row) - len(numbers))

    def _next(self) -> Eviction | None:
        """Return the eviction of the forward that begins now; None where nothing is to be dropped."""
        if self._plan is None or self._plan[0] != self.version:
            self._plan = self.version, self._planned()
        return self._plan[1]

    def _planned(self) -> Eviction | None:
        size, pads = self.block_size, self.padding()
        held = [self._num_held(row) - count for row, count in enumerate(pads)]
        lengths = [count + self._num_dropped(row) for row, count in enumerate(held)]
        # Asked once a block: in between, nothing can become a whole block inside a range.
        asked = [length // size * size for length in lengths]
        if asked == self._asked or not self.rows:
            return None
        self._follow()
        kept, removed = [], []
        for row, length in enumerate(asked):
            numbers = self.block_numbers[row] if not pads[row] else list(range(self._blocks_for(held[row])))
            dropped = self._droppable(length)
            stay = [number for number in numbers[:-1] if not _is_inside(range(number, number + 1), dropped)]
            kept.append(stay + numbers[-1:])
            removed.append(pads[row] + (len(numbers) - len(kept[-1])) * size)
        if removed == pads:
            self._asked = asked
            return None
        return Eviction(removed, self._columns(removed), kept, asked)

    def _droppable(self, length: int) -> list[range]:
        """Numbers of the blocks that the policy drops of a text of `length` tokens, a whole number of blocks."""
        size = self.block_size
        blocks = _blocks_inside(self.policy.after_step(length), size)
        if self.allocator.tails is None:
            return blocks
        least, most = 1, length // size - 1
        kept = (range(max(least, one.start), min(most, one.stop)) for one in blocks)
        return [one for one in kept if one]

    def _columns(self, removed: Sequence[int]) -> int:
        """Columns that no row fills once each has lost as many tokens as `removed` says."""
        return min(lag + count for lag, count in zip(self.lags, removed, strict=True))

    def _evict(self, num_tokens: int) -> None:
        """Drop what is to be dropped before a forward over `num_tokens` tokens a row."""
        eviction = self._next()
        if eviction is None:
            return
        pads = self.padding()
        self._drop(eviction, pads)
        self.evicted += sum(eviction.removed) - sum(pads)
        self.lags = [lag + n - eviction.columns for lag, n in zip(self.lags, eviction.removed, strict=True)]
        self.base += eviction.columns
        self.block_numbers, self.pads, self._asked = [list(row) for row in eviction.kept], [], list(eviction.asked)
        self._rows_changed()
        self._shrink(self.batch_size * self._blocks_for(num_tokens))

    def _drop(self, eviction: Eviction, pads: Sequence[int]) -> None:
        """Give the blocks back that are not kept; nothing changes where there is no room for copies of shared ones."""
        moving = [row for row, count in enumerate(pads) if count % self.block_size]
        self.allocator.ensure_free(sum(len(self._shared(row, len(eviction.kept[row]))) for row in moving))
        for row, kept in enumerate(eviction.kept):
            if row in moving:
                self._move_up(row, kept, pads[row])
            else:
                self._release_all_but(row, [self._place(row, number, pads[row]) for number in kept])

    def _place(self, row: int, number: int, pads: int) -> int:
        """Which block of a row, whose padding fills whole blocks, holds the block `number` of its text."""
        return self.block_numbers[row].index(number) if not pads else number + pads // self.block_size

    def _release_all_but(self, row: int, places: Sequence[int]) -> None:
        blocks, stay = self.rows[row], set(places)
        self.allocator.release([block for place, block in enumerate(blocks) if place not in stay])
        blocks[:] = [blocks[place] for place in places]
        if row < len(self.exact):
            self.exact[row] = tuple(i for i, place in enumerate(places) if place in self.exact[row])

    def _shared(self, row: int, num_blocks: int) -> list[int]:
        """Places of blocks among the first `num_blocks` of a row that somebody else holds as well."""
        return [i for i, block in enumerate(self.rows[row][:num_blocks]) if self.allocator.refcounts[block] > 1]

    def _own(self, row: int, num_blocks: int) -> None:
        """Copy those of the first `num_blocks` blocks of a row that somebody else holds as well."""
        blocks, shared = self.rows[row], self._shared(row, num_blocks)
        if not shared:
            return
        for place, copied in zip(shared, self.allocator.copy([blocks[i] for i in shared]), strict=True):
            blocks[place] = copied

    def _move_up(self, row: int, kept: Sequence[int], pads: int) -> None:
        """Let the kept tokens of a row begin at its first slot, where `pads` slots of padding did."""
        blocks, size = self.rows[row], self.block_size
        before, end = list(blocks), self._num_held(row) - pads
        self._own(row, len(kept))
        src, dst = [], []
        for place, number in enumerate(kept):
            for token in range(number * size, min((number + 1) * size, end)):
                src.append(before[(token + pads) // size] * size + (token + pads) % size)
                dst.append(blocks[place] * size + token % size)
        for pool in self.allocator.pools if src else ():
            pool.move_slots(src, dst)
        self._release_all_but(row, range(len(kept)))

    def _shrink(self, num_wanted: int) -> None:
        """Give memory back where most of the pools is free: once behind a prompt that was longer than what is kept."""
        allocator = self.allocator
        needed = allocator.num_blocks - allocator.num_free + num_wanted
        roomy = needed + max(allocator.extent, needed // 4)
        if not allocator.stays_put and allocator.num_blocks > 2 * roomy:
            allocator.relayout(roomy)

    def _require_held(self, lags: Sequence[int], clock: int) -> None:
        """Raise CacheStateError where a cache that had never read more than `clock` columns would hold more."""
        self._follow()
        for row, lag in enumerate(lags):
            numbers, length = self.block_numbers[row], clock - lag - self.base + self._num_dropped(row)
            gone = [range(a + 1, b) for a, b in zip([-1, *numbers], numbers, strict=False) if b > a + 1]
            if not gone:
                continue
            size = self.block_size
            dropped = self._droppable(max(0, length) // size * size)
            lost = [gap for gap in gone if not _is_inside(gap, dropped)]
            if lost:
                first, last = lost[-1].start * size, lost[-1].stop * size
                raise CacheStateError(
                    f"cannot crop row {row} to {max(0, length)} tokens: got a cache whose {self.policy} dropped its "
                    f"tokens {first} to {last - 1}, which a text of that length still has; call cache.reset() and "
                    "read the text again, or fork the cache with copy.deepcopy before what is to be undone"
                )
        if clock < 0:
            raise CacheStateError(f"cannot crop to {clock} tokens: got a cache that holds {self.clock}")


def _is_inside(blocks: range, ranges: Sequence[range]) -> bool:
    """Return whether one of the ascending `ranges` covers `blocks`."""
    place = bisect_right(ranges, blocks.start, key=lambda one: one.start) - 1
    return place >= 0 and blocks.stop <= ranges[place].stop


def _blocks_inside(ranges: Sequence[range], size: int) -> list[range]:
    """Numbers of the blocks of `size` tokens that lie wholly inside each of `ranges`."""
    blocks = (range(-(-one.start // size), one.stop // size) for one in ranges)
    return [inside for inside in blocks if inside]
