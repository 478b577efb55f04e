"""Block table: which blocks, in which order, hold the tokens of each row; one table for all layers of a kind.

    row 0   tokens 0..40    blocks [7][8][9]      length 41, the last block half full
    row 1   tokens 0..40    blocks [7][8][3]      blocks 7 and 8 shared with row 0: written never, copied on write

Time is counted by `clock`, the number of columns appended (less those cropped). A layer that has written up to clock c
asks `reserve(c + q)`: the first layer of a forward plans the step, the others find it done. A sliding table drops whole
blocks behind its window; `base` is the first token that it still holds.

Rows end at the clock and may begin at different columns: row i's token t stands in column lags[i] + t, and the columns
before lags[i] (left padding, or what a row accepted less of than others) are neither written nor read.
"""

from collections.abc import Sequence

from hf_kvopt.errors import CacheStateError, OutOfBlocks
from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.pool import tail
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.cuts import after_cut, require_held
from hf_kvopt.pool.exact_rows import ExactRows
from hf_kvopt.pool.holes import Holes
from hf_kvopt.pool.slots import Step
from hf_kvopt.pool.unevicted import Unevicted


class BlockTable(ExactRows, Unevicted):
    """Owns one reference to each block in its rows and gives them back when it is released or collected.

    Args:
        allocator: the block space, shared with forks of this table.
        block_size: tokens a block.
        window: sliding window in tokens (a query sees itself and `window - 1` before it), or None to keep all.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, window: int | None = None) -> None:
        super().__init__(allocator, block_size)
        self.window = window
        self.kind: int | str | EvictionPolicy | None = window  # under which the rows of a cache know it
        self.record_past = False
        self.keeps_all = False  # a window hides what is behind it, but frees nothing: others may share it
        self.keep_contiguous = True
        self.holes = Holes(allocator)
        # What was held before a step that replaced all of it: layers still read it, a failed forward goes back to it.
        self.retired: BlockTable | None = None
        self.step_start = 0  # the clock before the last `reserve`

    def adopt(self, rows: Sequence[Sequence[int]], lags: Sequence[int], clock: int) -> None:
        """Begin a batch with rows filled up to `clock`, whose blocks were retained for this table."""
        self.clear()
        self.rows[:] = [list(row) for row in rows]
        self.lags, self.clock, self.step_start = list(lags), clock, clock
        self._rows_changed()
        tail.settle(self)

    def advance(self, batch_size: int, clock: int, num_tokens: int) -> Step:
        """`reserve` for a layer that has written `clock` columns and adds `num_tokens`: where these go.

        Raises:
            CacheStateError, OutOfBlocks: see `reserve`.
        """
        asked = (batch_size, clock, num_tokens)
        if self._step is not None and self._step[0] == asked:
            return self._step[1]
        stop, first = clock + num_tokens, self.visible_start(clock)
        self.reserve(batch_size, stop)
        is_late = clock != self.step_start or stop != self.clock
        if is_late:
            self.unshare(clock, stop)
        if self.allocator.tails is not None:
            tail.plan(self, clock, stop)
        step = Step(max(clock, self.base), stop, stop - first, first - self.base)
        self._step = None if is_late else (asked, step)  # what is written late may be shared again by then
        return step

    def reserve(self, batch_size: int, clock: int) -> None:
        """Make room for the columns up to `clock`; a no-op where another layer already did.

        Raises:
            CacheStateError: the batch size changed.
            OutOfBlocks: the cap is reached; the table is as before.
        """
        if self.rows and batch_size != len(self.rows):
            raise CacheStateError(
                f"the cache holds {len(self.rows)} rows: got a batch of {batch_size}; call cache.reset() for a new "
                "batch, or batch_repeat_interleave / batch_select_indices to change this one"
            )
        num_tokens = clock - self.clock
        if num_tokens <= 0 and self.rows:
            return
        self._drop_retired()
        self.step_start = self.clock
        if not self.rows:
            self._start_rows([0] * batch_size, clock)
        elif self.replaces_window(num_tokens):
            self._start_rows(self.lags, clock)
        else:
            self._extend_rows(clock)
        self.clock = clock
        self._lengths_changed()

    def begin_later(self, lags: Sequence[int]) -> None:
        """Let rows that hold nothing of before the last step begin at the columns `lags`; their tokens are lost."""
        self._cut(lags, self.clock)
        self.lags = list(lags)
        self._rows_changed()
        tail.plan(self, self.step_start, self.clock)

    def rollback(self, clock: int) -> None:
        """Undo the last `reserve`, back to `clock`, or go back to 0, after a forward that failed half way."""
        if clock >= self.clock:
            return
        if clock == 0 and not self.is_ragged:
            self.clear()
        elif self.retired is not None:
            self._release_rows(self.rows)
            self.rows[:], self.base = self.retired.rows, self.retired.base
            self.retired.rows.clear()
            self.retired = None
        else:
            self._cut(self.lags, clock)
        self.clock = clock
        self._rows_changed()

    def crop(self, num_tokens: int) -> None:
        """Remove the last `num_tokens` columns, and what lies behind the window.

        Raises:
            CacheStateError: the window before the new end was already dropped.
        """
        self._crop_to(self.lags, self.clock - num_tokens)

    def crop_rows(self, lengths: Sequence[int]) -> None:
        """Cut row i down to `lengths[i]` tokens; the clock goes back by the least number cut."""
        self._crop_to(*after_cut(self, lengths))

    def restore(self, lags: Sequence[int], clock: int) -> None:
        """Go back to rows that reached up to column `clock`, those repeated since then once more alone.

        Raises:
            CacheStateError: blocks of these rows are gone.
        """
        if not lags:
            self.clear()
            return
        if self.retired is not None:
            self.rollback(self.step_start)
        if len(self.rows) != len(lags):
            self.select(range(0, len(self.rows), max(1, len(self.rows) // len(lags))))
        self._require_held(lags, clock)
        wanted = [self._blocks_for(clock - lag - self.base) for lag in lags]
        if len(self.rows) != len(lags) or any(len(row) < n for row, n in zip(self.rows, wanted, strict=True)):
            raise CacheStateError(f"cannot go back to {clock} tokens: got rows whose blocks were given away")
        self._cut(lags, clock)
        self.lags, self.clock = list(lags), clock
        self._rows_changed()
        tail.settle(self)

    def take_over(self, other: "BlockTable") -> None:
        """Become what `other` is, a fork of this table made earlier, and leave it empty."""
        self.clear()
        self.rows[:] = [list(row) for row in other.rows]
        self.lags, self.clock, self.base = list(other.lags), other.clock, other.base
        self.exact = list(other.exact)
        other.rows.clear()
        other.clear()
        self._rows_changed()

    def keep(self, num_tokens: int, paths: Sequence[Sequence[int]]) -> None:
        """Keep those of the last `num_tokens` tokens of row i that `paths[i]` numbers, moved together, in that order.

        Columns that no row has any more go.
        """
        lengths = [n - num_tokens + len(path) for n, path in zip(self.lengths, paths, strict=True)]
        clock = max(lengths, default=0)
        lags = [clock - length for length in lengths]
        self._require_held(lags, clock)
        src, dst = self._moved_slots(num_tokens, paths)
        for pool in self.allocator.pools if src else ():
            pool.move_slots(src, dst)
        self._crop_to(lags, clock)

    def require_croppable(self, num_tokens: int) -> None:
        """Raise CacheStateError unless `crop(num_tokens)` can be done."""
        self._require_held(self.lags, self.clock - num_tokens)

    def require_rows_croppable(self, lengths: Sequence[int]) -> None:
        """Raise CacheStateError unless `crop_rows(lengths)` can be done."""
        self._require_held(*after_cut(self, lengths))

    def _crop_to(self, lags: Sequence[int], clock: int) -> None:
        if not self.rows:
            return
        self._require_held(lags, clock)
        self._drop_retired()
        self._cut(lags, clock)
        self.lags, self.clock = list(lags), clock
        if self.window is not None and not self.keeps_all:
            self._drop_front(clock - max(lags) - self.window + 1)
        self._rows_changed()
        tail.settle(self)

    def _require_held(self, lags: Sequence[int], clock: int) -> None:
        require_held(self, lags, clock, self.window)

    def select(self, indices: Sequence[int]) -> None:
        """Let row i be what row `indices[i]` was (beams, repeats, batch selection); blocks are shared, not copied."""
        self._drop_retired()
        rows = [list(self.rows[i]) for i in indices]
        for row in rows:
            self.allocator.retain(row)
        self._release_rows(self.rows)
        self.rows[:] = rows
        self.exact, self.pins = (
            [kept[i] for i in indices] if len(kept) == len(self.lags) else [] for kept in (self.exact, self.pins)
        )
        self.lags = [self.lags[i] for i in indices]
        self._rows_changed()

    def fork(self) -> "BlockTable":
        """A second table over the same blocks; whoever writes first copies the block that is written."""
        self._drop_retired()
        child = self._empty_twin()
        for name in ("clock", "base", "kind", "record_past", "keeps_all", "keep_contiguous"):
            setattr(child, name, getattr(self, name))
        child.rows[:] = [list(row) for row in self.rows]
        child.lags, child.exact, child.pins = list(self.lags), list(self.exact), list(self.pins)
        child.is_approximate = self.is_approximate
        for row in child.rows:
            self.allocator.retain(row)
        return child

    def _empty_twin(self) -> "BlockTable":
        return BlockTable(self.allocator, self.block_size, self.window)

    def clear(self) -> None:
        """Give all blocks back and forget the batch."""
        self._drop_retired()
        self._release_rows(self.rows)
        self.rows.clear()
        self.lags, self.exact, self.pins, self.clock, self.base = [], [], [], 0, 0
        self.is_approximate = False
        self._rows_changed()

    def _start_rows(self, lags: list[int], clock: int) -> None:
        """Fresh rows up to column `clock`, less what a window drops at once; what was held is retired."""
        # Not rounded down to a block: where a step replaces what was held, the slots before it would never be written,
        # and a crop could bring them into sight.
        base = 0 if self.window is None or not self._starts_in_window else clock - max(lags) - self.window + 1
        base = max(0, base)
        sizes = [self._blocks_for(clock - lag - base) for lag in lags]
        self.allocator.ensure_free(sum(sizes))
        if self.rows:
            self.retired = BlockTable(self.allocator, self.block_size, self.window)
            self.retired.rows[:] = self.rows
            self.retired.lags, self.retired.base, self.retired.clock = self.lags, self.base, self.clock
        self.rows[:] = self.allocator.spread(sizes)
        self.lags, self.base = lags, base
        self._rows_changed()

    def _extend_rows(self, clock: int) -> None:
        if self._drops_past and self.window is not None:
            self._drop_front(self.clock - max(self.lags) - self.window + 1)
        wanted = [
            self._blocks_for(clock - lag - self.base) - len(row) for lag, row in zip(self.lags, self.rows, strict=True)
        ]
        copied = [row for row, _ in self._shared_places(self.clock, self.clock + 1)]  # half full and shared
        if copied or any(wanted):
            try:
                self.allocator.ensure_free(sum(wanted) + len(copied))
            except OutOfBlocks:
                # What another holder lets go of need not be copied.
                if not copied or not self.allocator.let_go([self.rows[i][-1] for i in copied]):
                    raise
                copied = [row for row, _ in self._shared_places(self.clock, self.clock + 1)]
                self.allocator.ensure_free(sum(wanted) + len(copied))
            if self.keep_contiguous:
                self.allocator.make_room(self.rows, wanted)
            self._append_blocks([size + (i in copied) for i, size in enumerate(wanted)], copied)
            self._rows_changed()

    def _drop_front(self, first: int) -> None:
        """Free the blocks that lie wholly before position `first`."""
        count = (first - self.base) // self.block_size
        if count <= 0:
            return
        for row in self.rows:
            self.allocator.release(row[:count])
            del row[:count]
        self.base += count * self.block_size
        self._rows_changed()

    def _drop_retired(self) -> None:
        if self.retired is not None:
            self.retired.clear()
            self.retired = None
