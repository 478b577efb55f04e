"""Number of blocks that a paged cache uses and reserves, by the rules of its table and allocator.

    used      a row of n tokens takes ceil(n / block_size) blocks; whole blocks before a window are freed
    reserved  pools grow by a quarter (16 blocks at least), up to max_tokens, so that rows stay contiguous

Source: pool/block_table.py and pool/allocator.py; the tests compare both sides.
"""

from typing import NamedTuple

from hf_kvopt.quant.sealed_formats import tail_blocks

_EXTENT = 16  # the least number of blocks that an allocator grows by


class BlockCount(NamedTuple):
    """Blocks of one table over all rows."""

    used: int
    reserved: int


def row_blocks(
    length: int,  # tokens of the row
    prompt: int | None,  # tokens of the first forward; None: the most blocks on any way to `length`
    window: int | None,
    block_size: int,
    keeps_prompt: bool = False,  # until the next step, as whole blocks are sealed from it
) -> int:
    """Return the blocks of a row after `length - prompt` single tokens behind a prompt fed in one forward."""
    if window is None:
        return -(-length // block_size)
    if prompt is None:
        return -(-(length if keeps_prompt else min(length, window + block_size - 1)) // block_size)
    base = 0 if keeps_prompt else max(0, prompt - window + 1)
    if length > prompt:
        base += max(0, length - window - base) // block_size * block_size
    return -(-(length - base) // block_size)


def count_blocks(
    batch: int,
    length: int,
    prompt: int | None,
    window: int | None,
    block_size: int,
    max_blocks: int | None = None,
    keeps_prompt: bool = False,
) -> BlockCount:
    """Return the blocks that `batch` rows of `length` tokens use and reserve; see `row_blocks`."""
    used = batch * row_blocks(length, prompt, window, block_size, keeps_prompt)
    if prompt is None or prompt >= length:
        return BlockCount(used, _grown(used, max_blocks))
    space = _Space(batch, row_blocks(prompt, prompt, window, block_size, keeps_prompt), max_blocks)
    base = 0 if window is None or keeps_prompt else max(0, prompt - window + 1)
    for now in range(prompt, length):
        dropped = 0 if window is None else max(0, now - window + 1 - base) // block_size
        base += dropped * block_size
        space.drop_front(dropped)
        if -(-(now + 1 - base) // block_size) > space.row:
            space.extend()
    return BlockCount(used, space.size)


def tail_places(batch: int, length: int, prompt: int | None, window: int | None, block_size: int) -> BlockCount:
    """Return the exact places that `batch` rows of `length` tokens use and reserve, where blocks are sealed."""
    first = length if prompt is None else min(prompt, length)
    steps = [(0, first), *((n, n + 1) for n in range(first, length) if n == first or n % block_size == 0)]
    used = reserved = 0
    for before, after in steps:
        dropped = 0 if window is None else max(0, before - window + 1) // block_size
        used = batch * sum(block >= dropped for block in tail_blocks(before, after, block_size))
        if used > reserved:
            reserved += max(used - reserved, reserved // 8)
    return BlockCount(used, reserved)


def _grown(needed: int, max_blocks: int | None) -> int:
    size = needed + max(_EXTENT, needed // 4)
    return size if max_blocks is None else min(size, max_blocks)


class _Space:
    """Rows of equal length in one pool: their blocks, and the free blocks between and after them."""

    def __init__(self, batch: int, row: int, max_blocks: int | None) -> None:
        self.batch, self.row, self.max_blocks = batch, row, max_blocks
        self.size = self.gap = self.tail = 0
        self._lay_out(_grown(batch * row, max_blocks))

    def drop_front(self, num_blocks: int) -> None:
        """Free the first blocks of each row."""
        self.row -= num_blocks
        self.gap += num_blocks

    def extend(self) -> None:
        """Add one block to each row, growing the pool or moving its rows as the allocator does."""
        missing = self.batch - (self.size - self.batch * self.row)
        if missing > 0:
            self._lay_out(_grown(self.size + missing, self.max_blocks))
        if self.tail < 1 or (self.batch > 1 and self.gap < 1):
            held = self.batch * self.row
            least = held + self.batch * (1 + held // (16 * self.batch))
            if self.max_blocks is None or self.max_blocks >= least:
                size = max(self.size, least + max(_EXTENT, held // 4))
                self._lay_out(size if self.max_blocks is None else min(size, self.max_blocks))
        self.row, self.gap, self.tail = self.row + 1, self.gap - 1, self.tail - 1

    def _lay_out(self, size: int) -> None:
        self.size = size
        self.gap = (size - self.batch * self.row) // self.batch
        self.tail = size - (self.batch - 1) * (self.row + self.gap) - self.row
