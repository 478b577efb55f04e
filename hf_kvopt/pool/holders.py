"""Who follows an allocator's block numbers: holders of blocks, and the pools in which they lie."""

from collections.abc import Sequence
from typing import Protocol


class BlockHolder(Protocol):
    """Whoever holds blocks (a table, a prefix tree): asked for them and told when they move."""

    def held_rows(self) -> Sequence[Sequence[int]]:
        """Every block list that this holder keeps a reference on, one count a mention."""
        ...

    def renumber(self, new_ids: dict[int, int]) -> None:
        """Replace each block number by `new_ids[number]`."""
        ...


class BlockPool(Protocol):
    """Storage that follows the allocator's block numbers."""

    @property
    def num_bytes(self) -> int:
        """Bytes held, free blocks included."""
        ...

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Move to storage of `num_blocks` blocks, block `src[i]` becoming `dst[i]`."""
        ...

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Copy the bytes of block `src[i]` to `dst[i]`, scales included."""
        ...

    def move_slots(self, src: list[int], dst: list[int]) -> None:
        """Copy the tokens in slots `src` to slots `dst`, all read before one is written, scales included."""
        ...
