"""Block allocator: which blocks of a pool are free, and how many rows hold each of the others.

    refcount  [2][1][1][0][0][1][0][0][0]      a block with refcount > 1 is shared and must be copied before a write
    run       |--used--|-free-|  |--free--|    free blocks are kept as maximal runs, so that a row can be handed
                                               neighbours and stays one contiguous piece of memory when it grows

One allocator serves one or more block tables (forks of a cache share it) and the pools of all their layers: a block
number means the same slots in each pool. Invariant between calls: free + held == num_blocks, refcount == number of
holders (PagedAttention, arXiv:2309.06180).
"""

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hf_kvopt.errors import KVOptError, OutOfBlocks
from hf_kvopt.pool.free_runs import FreeRuns
from hf_kvopt.pool.holders import BlockHolder
from hf_kvopt.pool.live import LivePools
from hf_kvopt.pool.slots import is_one_run
from hf_kvopt.pool.tail import Tails


class BlockAllocator:
    """Owns the free list and reference counts of one block space; grows by extents up to `max_blocks`.

    Args:
        max_blocks: hard cap, or None to grow as needed.
        extent: the least number of blocks added by one growth.
        block_size: tokens a block of the tables that are served: errors speak of tokens first.
        stays_put: blocks keep their numbers for life, so that holders in several threads may read while one grows.
        on_shortage: told how many blocks are missing before the pools grow; it may release some (evict) instead.
        lock: one for all allocators that change together.
        on_conflict: asked, where no block is left to copy them to, to let go of shared blocks that are to be written;
            returns whether it did.
    """

    def __init__(
        self,
        max_blocks: int | None = None,
        extent: int = 16,
        *,
        block_size: int = 16,
        stays_put: bool = False,
        on_shortage: Callable[["BlockAllocator", int], None] | None = None,
        lock: AbstractContextManager[Any] | None = None,
        on_conflict: Callable[["BlockAllocator", list[int]], bool] | None = None,
    ) -> None:
        self.max_blocks, self.extent, self.block_size = max_blocks, extent, block_size
        self.refcounts: list[int] = []
        self.num_changes = 0  # counts changes of who holds blocks, but for those that begin to be held
        self.pools = LivePools()
        self.tails: Tails | None = None  # where a layer seals its blocks
        self.holders: weakref.WeakSet[BlockHolder] = weakref.WeakSet()
        self.stays_put, self.on_shortage, self.on_conflict = stays_put, on_shortage, on_conflict
        self.lock = lock if lock is not None else threading.RLock()
        self.free = FreeRuns()
        self.abandoned: deque[list[int]] = deque()  # rows of collected holders, given back at the next call

    @property
    def num_blocks(self) -> int:
        """Blocks that the pools hold memory for."""
        return len(self.refcounts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.free.num_free

    @property
    def num_available(self) -> int | None:
        """Blocks that could still be handed out, growth included; None without a cap."""
        return None if self.max_blocks is None else self.max_blocks - self.num_blocks + self.num_free

    def add_holder(self, holder: BlockHolder) -> None:
        """Count on `holder` from now on; it is forgotten once it is collected."""
        with self.lock:
            self.holders.add(holder)

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        """Take `num_blocks` free blocks, the neighbours of block `after` first, each with refcount 1.

        Raises:
            OutOfBlocks: fewer are free; nothing is taken.
        """
        with self.lock:
            self.require_free(num_blocks)
            blocks: list[int] = []
            while len(blocks) < num_blocks:
                start = blocks[-1] + 1 if blocks else (-1 if after is None else after + 1)
                if start not in self.free.ends:
                    start = self.free.longest()
                end = min(self.free.ends[start], start + num_blocks - len(blocks))
                blocks += self._take(start, end)
            return blocks

    def spread(self, sizes: Sequence[int]) -> list[list[int]]:
        """Take one piece per size, evenly spaced over the largest free run so that each has room to grow behind it."""
        with self.lock:
            self.require_free(sum(sizes))
            if not self.free.ends:
                return [[] for _ in sizes]
            start = self.free.longest()
            # A used left neighbour is a row that may still grow: leave it the first share of the run.
            shares = len(sizes) + (start > 0)
            pitch = (self.free.ends[start] - start) // shares
            if pitch == 0 or pitch < max(sizes):
                return [self.allocate(size) for size in sizes]
            first = start + pitch * (shares - len(sizes))
            return [self._take(first + i * pitch, first + i * pitch + size) for i, size in enumerate(sizes)]

    def allocate_behind(self, rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
        """Take `sizes[i]` blocks for row i: behind its last one where they are free, else apart with room to grow."""
        with self.lock:
            self.require_free(sum(sizes))
            pieces: list[list[int]] = [[] for _ in sizes]
            apart = []
            for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
                if row and size and (len(sizes) == 1 or self.can_extend(row[-1], size)):
                    pieces[i] = self.allocate(size, after=row[-1])
                elif size:
                    apart.append(i)
            if apart:
                for i, piece in zip(apart, self.spread([sizes[i] for i in apart]), strict=True):
                    pieces[i] = piece
            return pieces

    def can_extend(self, last: int, num_blocks: int) -> bool:
        """Return whether the `num_blocks` blocks right behind block `last` are free."""
        return self.free.room_behind(last) >= num_blocks

    def require_free(self, num_blocks: int) -> None:
        """Raise OutOfBlocks unless `num_blocks` blocks are free now."""
        if num_blocks > self.num_free:
            raise OutOfBlocks.asked_for(num_blocks, self.num_free, self.num_blocks, self.block_size)

    def ensure_free(self, num_blocks: int) -> None:
        """Grow until `num_blocks` blocks are free; raise OutOfBlocks, unchanged, where the cap forbids it."""
        with self.lock:
            self.reclaim()
            if num_blocks > self.num_free and self.on_shortage is not None:
                self.on_shortage(self, num_blocks - self.num_free)
            missing = num_blocks - self.num_free
            if missing <= 0:
                return
            if self.max_blocks is not None and self.num_blocks + missing > self.max_blocks:
                raise OutOfBlocks.asked_for(
                    num_blocks, self.max_blocks - self.num_blocks + self.num_free, self.max_blocks, self.block_size
                )
            needed = self.num_blocks + missing
            # Blocks that stay put are there to be kept over many calls: growing must be rare.
            self.relayout(needed + max(self.extent, needed if self.stays_put else needed // 4))

    def let_go(self, blocks: list[int]) -> bool:
        """Ask who keeps texts in shared `blocks` to let go of them; whether any was let go."""
        return self.on_conflict is not None and self.on_conflict(self, blocks)

    def extend(self, num_blocks: int) -> None:
        """Grow to `num_blocks` blocks (at most the cap), each held block staying where it is."""
        with self.lock:
            if self.max_blocks is not None:
                num_blocks = min(num_blocks, self.max_blocks)
            held = [block for block, count in enumerate(self.refcounts) if count]
            for pool in self.pools:
                pool.resize(num_blocks, held, held)
            self.refcounts += [0] * (num_blocks - self.num_blocks)
            self._rebuild_runs()

    def make_room(self, rows: Sequence[list[int]], wanted: Sequence[int]) -> None:
        """Lay the pools out anew where a row in one piece could not stay so: one copy now, a view at each step after.

        Only rows that nobody shares are worth it, and only where the cap leaves enough to pay for the copy.
        """
        with self.lock:
            stuck = [row for row, n in zip(rows, wanted, strict=True) if n and row and not self.can_extend(row[-1], n)]
            if self.stays_put or not any(is_one_run(row) and all(self.refcounts[b] == 1 for b in row) for row in stuck):
                return
            held = self.num_blocks - self.num_free
            num_rows = sum(len(holder.held_rows()) for holder in self.holders)
            least = held + num_rows * (max(wanted) + held // (16 * num_rows))
            size = max(self.num_blocks, least + max(self.extent, held // 4))
            if self.max_blocks is None or self.max_blocks >= least:
                self.relayout(size)

    def relayout(self, num_blocks: int) -> None:
        """Move every held block into pools of `num_blocks` blocks (at most the cap), rows contiguous and spread.

        A block is copied once, to the place that the first row holding it gives it. Costs one copy of the cache, a
        layer at a time, and is amortised by growing in proportion.
        """
        if self.stays_put:
            self.extend(num_blocks)
            return
        with self.lock:
            if self.max_blocks is not None:
                num_blocks = min(num_blocks, self.max_blocks)
            # Held on to, so that none is collected after it was renumbered and its rows with `abandoned` a second time.
            holders = list(self.holders)
            abandoned = list(self.abandoned)
            rows = [row for holder in holders for row in holder.held_rows() if row] + abandoned
            held = self.num_blocks - self.num_free
            pitch = num_blocks // max(1, len(rows))
            # Rows that share nothing begin evenly spaced where they can: one strided view then shows all of them.
            is_even = sum(map(len, rows)) == held and pitch >= max(map(len, rows), default=0)
            gap = (num_blocks - held) // max(1, len(rows))
            new_ids: dict[int, int] = {}
            cursor = 0
            for place, row in enumerate(rows):
                cursor = place * pitch if is_even else cursor
                for block in row:
                    if block not in new_ids:
                        new_ids[block] = cursor
                        cursor += 1
                cursor += gap
            refcounts = [0] * num_blocks
            for old, new in new_ids.items():
                refcounts[new] = self.refcounts[old]
            for pool in self.pools:
                pool.resize(num_blocks, list(new_ids.keys()), list(new_ids.values()))
            for holder in holders:
                holder.renumber(new_ids)
            for row in abandoned:
                row[:] = [new_ids[block] for block in row]
            if self.tails is not None:
                self.tails.renumber(new_ids)
            self.refcounts = refcounts
            self._rebuild_runs()

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block."""
        with self.lock:
            self.num_changes += 1
            for block in blocks:
                self.refcounts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a holder of each block; those without one become free."""
        with self.lock:
            for block in blocks:
                self.num_changes += 1
                if self.refcounts[block] <= 0:
                    raise KVOptError(f"block {block} was released twice; this is a bug, run check_integrity()")
                self.refcounts[block] -= 1
                if self.refcounts[block] == 0:
                    self.free.give(block)

    def copy(self, blocks: Sequence[int]) -> list[int]:
        """Swap the caller's references to `blocks` for references to copies of them, made in free blocks."""
        with self.lock:
            copies = self.allocate(len(blocks))
            for pool in self.pools:
                pool.copy_blocks(list(blocks), copies)
            self.release(blocks)
            return copies

    def reclaim(self) -> None:
        """Take back the blocks of holders that were collected."""
        with self.lock:
            while self.abandoned:
                self.release(self.abandoned.popleft())

    def recount(self) -> None:
        """Count anew what the holders hold: an interrupt in the middle of a change leaves blocks to nobody."""
        with self.lock:
            held = self._held()
            self.refcounts = [held.get(block, 0) for block in range(self.num_blocks)]
            self._rebuild_runs()

    def check_integrity(self) -> None:
        """Raise KVOptError unless refcounts, free runs and the holders' rows agree exactly."""
        with self.lock:
            self.reclaim()
            self.free.check(self.refcounts, self._held())

    def _held(self) -> Counter[int]:
        """Return how often each block is held."""
        # Holders first: one that is collected meanwhile has left its rows with `abandoned` before.
        rows = [*(row for holder in list(self.holders) for row in holder.held_rows()), *self.abandoned]
        return Counter(block for row in rows for block in row)

    def _take(self, start: int, end: int) -> list[int]:
        """Hold the free blocks [start, end)."""
        self.refcounts[start:end] = [1] * (end - start)
        if self.tails is not None:
            self.tails.forget(range(start, end))
        return self.free.take(start, end)

    def _rebuild_runs(self) -> None:
        self.num_changes += 1
        self.free = FreeRuns(block for block, count in enumerate(self.refcounts) if count == 0)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "lock": None, "holders": list(self.holders)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.lock, self.holders = threading.RLock(), weakref.WeakSet(state["holders"])  # type: ignore[call-overload]
