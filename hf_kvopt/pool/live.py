"""LivePools: the pools that follow one block space, for as long as somebody else holds them.

layer ──► pool ◄── layer of a fork          a pool goes with the last layer that reads it: a cache that begins anew
            ▲                               with states of another dtype leaves nothing behind, and a fork of it
allocator ─ ┘ (weak)                        keeps what it reads
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any


class LivePools:
    """Pools in the order in which they were added; holds none of them."""

    def __init__(self, pools: Iterable[Any] = ()) -> None:
        self._refs: list[weakref.ref[Any]] = []
        self.extend(pools)

    def append(self, pool: Any) -> None:
        """Add a pool."""
        self._refs = [ref for ref in self._refs if ref() is not None] + [weakref.ref(pool)]

    def extend(self, pools: Iterable[Any]) -> None:
        """Add pools."""
        for pool in pools:
            self.append(pool)

    def __iter__(self) -> Iterator[Any]:
        return iter([pool for ref in self._refs if (pool := ref()) is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> tuple[Any, ...]:
        # What holds the pools is pickled in the same stream, and goes on holding them when it is read.
        return LivePools, (list(self),)
