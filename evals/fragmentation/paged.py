"""Strategy of this library: its own allocator and block tables, driven as its caches drive them."""

from dataclasses import dataclass

from evals.fragmentation.simulate import Use
from evals.fragmentation.workload import Request
from hf_kvopt import OutOfBlocks
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.prefix.index import PrefixIndex

_ENTRY_BYTES = 4  # a block number, or a count


@dataclass(eq=False)
class _Sequence:
    request: Request
    table: BlockTable
    left: int


class Paged:
    """One block table for each sequence over one allocator.

    Args:
        pool: number of slots.
        block_size: slots of a block.
        copies_on_write: samples of a request share its prompt.
        shares_prefixes: prefixes common with earlier prompts are found in a tree.
    """

    def __init__(
        self, pool: int, block_size: int, copies_on_write: bool = False, shares_prefixes: bool = False
    ) -> None:
        self.block_size, self.copies_on_write, self.shares_prefixes = block_size, copies_on_write, shares_prefixes
        self.allocator = BlockAllocator(
            pool // block_size, block_size=block_size, stays_put=True, on_shortage=self._evict
        )
        self.index = PrefixIndex([self.allocator], block_size)
        self.allocator.ensure_free(pool // block_size)
        self.sequences: list[_Sequence] = []

    @property
    def num_running(self) -> int:
        """Number of sequences that generate."""
        return len(self.sequences)

    def admit(self, request: Request) -> bool:
        """Take all samples of a request, or none."""
        taken: list[_Sequence] = []
        try:
            for output_len in request.output_lens:
                is_copy = bool(taken) and self.copies_on_write
                table = taken[0].table.fork() if is_copy else self._table_for(request)
                taken.append(_Sequence(request, table, output_len))
        except OutOfBlocks:
            _release(taken)
            return False
        self.sequences += taken
        return True

    def step(self) -> list[Request]:
        """Add one token to each sequence; where blocks run out, preempt and return the youngest request."""
        out: list[Request] = []
        for sequence in list(self.sequences):
            while sequence in self.sequences:
                try:
                    sequence.table.reserve(1, sequence.table.clock + 1)
                except OutOfBlocks:
                    request = self.sequences[-1].request
                    _release([other for other in self.sequences if other.request is request])
                    self.sequences = [other for other in self.sequences if other.request is not request]
                    out.append(request)
                else:
                    sequence.left -= 1
                    break
        _release([sequence for sequence in self.sequences if sequence.left <= 0])
        self.sequences = [sequence for sequence in self.sequences if sequence.left > 0]
        return out

    def use(self, waiting: Request | None) -> Use:
        """Return the current use; blocks that only the tree holds are freed on demand, and so count as free."""
        filled: dict[int, int] = {}
        entries = 0
        for sequence in self.sequences:
            row, length = sequence.table.rows[0], sequence.table.clock
            entries += len(row)
            for place, block in enumerate(row):
                count = min(self.block_size, length - place * self.block_size)
                filled[block] = max(filled.get(block, 0), count)
        metadata = _ENTRY_BYTES * (entries + self.allocator.num_blocks)
        return Use(sum(filled.values()), len(filled) * self.block_size, 0, metadata)

    def _table_for(self, request: Request) -> BlockTable:
        table = BlockTable(self.allocator, self.block_size)
        table.keep_contiguous = False
        if self.shares_prefixes:
            match = self.index.match(None, request.prompt[:-1])
            table.adopt(self.index.take(match), [0], match.length)
        try:
            table.reserve(1, request.prompt_len)
        except OutOfBlocks:
            table.clear()
            raise
        if self.shares_prefixes:
            self.index.insert(None, request.prompt, [table.rows[0]])
        return table

    def _evict(self, allocator: BlockAllocator, missing: int) -> None:
        self.index.evict(missing)


def _release(sequences: list[_Sequence]) -> None:
    for sequence in sequences:
        sequence.table.clear()
