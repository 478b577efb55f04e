"""Holes: blocks that single rows of a table gave back, because no query of the row looks at them any more.

    window 32    row a    200 tokens    [h][h][h][h][h][h][h][h][h][h][10][11][12]      h is one block for all holes
                 row b     20 tokens    [20][21]

A table drops in front what no row needs; a long row beside a short one would keep all. One block, the hole, takes the
places that a row gave back, so that places in rows stay what they are. Nothing is read of it: the window hides it.
"""

from collections.abc import Sequence

from hf_kvopt.pool.allocator import BlockAllocator


class Holes:
    """Knows the hole of one table.

    Args:
        allocator: of the blocks.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self.allocator = allocator
        self.block: int | None = None

    def count(self, row: Sequence[int]) -> int:
        """Blocks that a row begins with and has given back."""
        return next((place for place, block in enumerate(row) if block != self.block), len(row))

    def release(self, rows: Sequence[list[int]], counts: Sequence[int]) -> bool:
        """Give the first `counts[i]` blocks of row i back, where they are still held; returns whether any was."""
        given = [
            (row, self.count(row), count)
            for row, count in zip(rows, counts, strict=True)
            if count > self.count(row)
        ]  # fmt: skip
        if not given:
            return False
        is_used = any(self.count(row) for row in rows)
        with self.allocator.lock:
            for row, first, count in given:
                self.allocator.release(row[first:count])
            if not is_used and not self.allocator.num_free:
                # Known texts hold them all as well, and there is no block for a hole: nothing is won.
                for row, first, count in given:
                    self.allocator.retain(row[first:count])
                return False
            total = sum(count - first for _, first, count in given)
            if not is_used:
                self.block = self.allocator.allocate(1)[0]
                total -= 1
            assert self.block is not None
            self.allocator.retain([self.block] * total)
            for row, first, count in given:
                row[first:count] = [self.block] * (count - first)
        return True
