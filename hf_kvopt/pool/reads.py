"""Notes that those who read a layer leave with its pool, and the step guard that its cache gives them."""

import weakref
from collections.abc import Callable
from typing import Protocol

from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.bounds import KeyBounds

FindsTables = Callable[[BlockTable], BlockTable]
"""Gives the table of other rows, or of a cache that begins anew, in the place of a table."""


class LayerReads:
    """Notes on the reads of one layer's pool; caches that share the pool share them.

    Args:
        is_first: the pool is the first one of its cache: at its layer a whole forward is checked.
    """

    def __init__(self, is_first: bool = False) -> None:
        self.is_first = is_first
        self.owner: weakref.ref[object] | None = None  # the attention module that filled the pool
        self.slides: bool | None = None  # whether transformers' own cache would slide here; not known at first
        self.bounds: KeyBounds | None = None  # of the keys, where the policy of the rows selects blocks
        self.num_fallbacks = 0  # operations that were given a gathered copy

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "owner": None}


class StepGuard(Protocol):
    """The step that a cache is in, owned by the cache."""

    def undo(self, table: BlockTable) -> None:
        """Take back, in all tables, the step that was last reserved in `table`: whoever reads it cannot take it."""
        ...
