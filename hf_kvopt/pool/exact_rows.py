"""ExactRows: rows that know which of their blocks are kept exact, where others are sealed; `pool.tail` says which."""

import torch
from torch import Tensor

from hf_kvopt.pool import tail
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_rows import BlockRows


class ExactRows(BlockRows):
    """Rows of blocks of which some are kept as the model computed them.

    Args:
        allocator: the block space, shared with forks.
        block_size: tokens a block.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        super().__init__(allocator, block_size)
        self.exact: list[tuple[int, ...]] = []  # blocks of each row that are kept exact where others are sealed
        self.pins: list[tuple[int, ...]] = []  # of these, those that stay so
        self.is_approximate = False  # exact blocks were made of sealed ones, after a cut

    def exact_blocks(self) -> list[int]:
        """Blocks of the rows that are kept exact where others are sealed."""
        return tail.numbers_of(self)

    def exact_table(self, device: torch.device) -> Tensor:
        """Return [batch, max_blocks] int32: where the exact ones of each row's blocks lie; see `tail.exact_table`."""
        return tail.exact_table(self, device)
