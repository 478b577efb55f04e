"""BlockRows: rows of blocks that are owned, shared and copied on write; `BlockTable` says when."""

import weakref
from collections.abc import Sequence

from hf_kvopt.pool.addresses import Addresses
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.slots import Memo


class BlockRows(Addresses):
    """Rows that hold one reference to each of their blocks, and give them back when they are released or collected.

    Args:
        allocator: the block space, shared with forks.
        block_size: tokens a block.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(block_size)
        self.allocator = allocator
        allocator.add_holder(self)
        self._watch()

    def held_rows(self) -> list[list[int]]:
        """The rows."""
        return self.rows

    def renumber(self, new_ids: dict[int, int]) -> None:
        """Follow a relayout of the allocator."""
        for row in self.rows:
            row[:] = [new_ids[block] for block in row]
        self._rows_changed()

    def unshare(self, start: int, stop: int) -> None:
        """Copy the shared blocks behind the columns `start` to `stop`: `reserve` looks at the last one of a row alone,
        and a layer writes before it where others of its kind hold more (cross attention to a large image)."""
        places = self._shared_places(start, stop)
        if places:
            self.allocator.ensure_free(len(places))
            copies = self.allocator.copy([self.rows[i][j] for i, j in places])
            for (i, j), block in zip(places, copies, strict=True):
                self.rows[i][j] = block
            self._rows_changed()

    def num_shared(self, start: int, stop: int) -> int:
        """Count the blocks that a write to the columns `start` to `stop` copies first, as others hold them too."""
        return len(self._shared_places(start, stop))

    def _shared_places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(row, index in the row) of shared blocks behind these columns; the last holder may keep one."""
        left: dict[int, int] = {}
        places = []
        for i, (row, lag) in enumerate(zip(self.rows, self.lags, strict=True)):
            first = self.base + lag  # the column of the row's first slot
            for j in range(
                max(0, start - first) // self.block_size, min(len(row), -(-(stop - first) // self.block_size))
            ):
                left.setdefault(row[j], self.allocator.refcounts[row[j]])
                if left[row[j]] > 1:
                    left[row[j]] -= 1
                    places.append((i, j))
        return places

    def _moved_slots(self, num_tokens: int, paths: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """(from, to) slots where of the last `num_tokens` tokens of row i those numbered in `paths[i]` close up."""
        size, src, dst = self.block_size, [], []
        for row, length, path in zip(self.rows, self.lengths, paths, strict=True):
            first = length - num_tokens - self.base
            for place, node in enumerate(path):
                if node != place:
                    src.append(row[(first + node) // size] * size + (first + node) % size)
                    dst.append(row[(first + place) // size] * size + (first + place) % size)
        return src, dst

    def _append_blocks(self, sizes: Sequence[int], copied: Sequence[int]) -> None:
        """Lengthen row i by `sizes[i]` blocks; the first takes the place of its last one where that is copied."""
        kept = [row[:-1] if i in copied else row for i, row in enumerate(self.rows)]
        pieces = self.allocator.allocate_behind(kept, sizes)
        src, dst = [self.rows[i][-1] for i in copied], [pieces[i][0] for i in copied]
        if copied:
            for pool in self.allocator.pools:
                pool.copy_blocks(src, dst)
        self.rows[:] = [row + piece for row, piece in zip(kept, pieces, strict=True)]
        self.allocator.release(src)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-max(0, num_tokens) // self.block_size)

    def _cut(self, lags: Sequence[int], clock: int) -> None:
        for row, lag in zip(self.rows, lags, strict=True):
            keep = self._blocks_for(clock - lag - self.base)
            self.allocator.release(row[keep:])
            del row[keep:]

    def _release_rows(self, rows: list[list[int]]) -> None:
        for row in rows:
            self.allocator.release(row)
            row.clear()

    def _watch(self) -> None:
        """Give the blocks back when the table is collected."""
        self._finalizer = weakref.finalize(self, _give_back, self.allocator, self.rows)
        self._finalizer.atexit = False

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        del state["_finalizer"]
        state["_tensors"], state["_rows_on"], state["_shared_of"] = Memo(), None, None
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._watch()


def _give_back(allocator: BlockAllocator, rows: list[list[int]]) -> None:
    # The collector may run this in the middle of an allocator call: leave the blocks where the next call finds them.
    allocator.abandoned.extend(rows)
