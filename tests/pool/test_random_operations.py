"""Random operation sequences on tables that share an allocator, held against plain Python lists.

Between any two operations: every block is free or held exactly as often as it is counted, and each row of each table
reads as the list that the same operations gave.
"""

import gc

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_kvopt.errors import CacheStateError, OutOfBlocks
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.storage import KVPool

BLOCK, NUM_POOLS, CAP = 4, 2, 40
picks = st.integers(0, 1000)


class Shadow:
    """A table and what its rows should read."""

    def __init__(self, table: BlockTable, rows: list[list[int]]) -> None:
        self.table, self.rows = table, rows


class TableMachine(RuleBasedStateMachine):
    window: int | None = None
    cap: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(max_blocks=self.cap, extent=3)
        states = torch.zeros(1, 1, 0, 2)
        self.pools = [KVPool(states, states, BLOCK, 0) for _ in range(NUM_POOLS)]
        self.allocator.pools.extend(self.pools)
        self.shadows = [Shadow(BlockTable(self.allocator, BLOCK, self.window), [])]
        self.next_token = 1

    @initialize(batch=st.integers(1, 3), contiguous=st.booleans())
    def begin(self, batch: int, contiguous: bool) -> None:
        self.shadows[0].table.keep_contiguous = contiguous
        self.shadows[0].rows = [[] for _ in range(batch)]

    @rule(pick=picks, num_tokens=st.integers(1, 13))
    def append(self, pick: int, num_tokens: int) -> None:
        shadow = self.pick(pick)
        table, columns = shadow.table, shadow.table.clock
        used = self.allocator.num_blocks - self.allocator.num_free
        before = [list(row) for row in table.rows]
        try:
            table.reserve(len(shadow.rows), table.clock + num_tokens)
        except OutOfBlocks:
            # Nothing was taken; a window may have let go of what it no longer shows.
            assert self.allocator.num_blocks - self.allocator.num_free <= used
            assert all(new == old[len(old) - len(new) :] for new, old in zip(table.rows, before, strict=True))
            return
        self.fill(shadow, columns, num_tokens)

    @rule(pick=picks, num_tokens=st.integers(1, 13))
    def begin_a_forward_that_fails(self, pick: int, num_tokens: int) -> None:
        table = self.pick(pick).table
        clock = table.clock
        try:
            table.reserve(len(self.pick(pick).rows), clock + num_tokens)
        except OutOfBlocks:
            return
        table.rollback(clock)
        assert table.clock == clock

    @rule(pick=picks, num_tokens=st.integers(0, 9))
    def crop(self, pick: int, num_tokens: int) -> None:
        shadow = self.pick(pick)
        if shadow.table.rows:
            self.cut(shadow, [len(row) - num_tokens for row in shadow.rows])

    @precondition(lambda self: self.window is None)
    @rule(pick=picks, removed=st.lists(st.integers(0, 5), min_size=8, max_size=8))
    def crop_rows_unevenly(self, pick: int, removed: list[int]) -> None:
        shadow = self.pick(pick)
        if shadow.table.rows:
            self.cut(shadow, [max(0, len(row) - n) for row, n in zip(shadow.rows, removed, strict=False)])

    @rule(pick=picks, rows=st.lists(st.integers(0, 7), min_size=1, max_size=4))
    def select(self, pick: int, rows: list[int]) -> None:
        shadow = self.pick(pick)
        if shadow.table.rows:
            indices = [row % len(shadow.rows) for row in rows]
            shadow.table.select(indices)
            shadow.rows = [list(shadow.rows[i]) for i in indices]

    @precondition(lambda self: len(self.shadows) < 4)
    @rule(pick=picks)
    def fork(self, pick: int) -> None:
        shadow = self.pick(pick)
        self.shadows.append(Shadow(shadow.table.fork(), [list(row) for row in shadow.rows]))

    @precondition(lambda self: len(self.shadows) > 1)
    @rule(pick=picks)
    def drop_a_holder(self, pick: int) -> None:
        self.shadows.pop(pick % len(self.shadows))

    @rule(pick=picks, batch=st.integers(1, 3))
    def clear(self, pick: int, batch: int) -> None:
        shadow = self.pick(pick)
        shadow.table.clear()
        shadow.rows = [[] for _ in range(batch)]

    @rule(extra=st.integers(0, 9))
    def relayout(self, extra: int) -> None:
        self.allocator.relayout(self.allocator.num_blocks + extra)

    @precondition(lambda self: self.window is not None)
    @rule(pick=picks, record=st.booleans())
    def record_past(self, pick: int, record: bool) -> None:
        self.pick(pick).table.record_past = record

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        self.allocator.check_integrity()
        held = {b for s in self.shadows for t in (s.table, s.table.retired) if t for row in t.rows for b in row}
        assert len(held) + self.allocator.num_free == self.allocator.num_blocks
        assert self.cap is None or self.allocator.num_blocks <= self.cap
        assert all(pool.keys.num_blocks == self.allocator.num_blocks for pool in self.pools)

    @invariant()
    def rows_read_as_they_were_written(self) -> None:
        for shadow in self.shadows:
            table = shadow.table
            if not table.rows:
                continue
            assert table.lengths == [len(row) for row in shadow.rows]
            assert table.base <= table.visible_start(table.clock)
            for i, pool in enumerate(self.pools):
                keys = pool.keys.read(table, table.clock - table.base)
                for got, row in zip(keys, shadow.rows, strict=True):
                    held = row[table.base :]
                    assert got[0, got.shape[1] - len(held) :, 0].tolist() == [token + i / 2 for token in held]

    def pick(self, pick: int) -> Shadow:
        return self.shadows[pick % len(self.shadows)]

    def fill(self, shadow: Shadow, columns: int, num_tokens: int) -> None:
        """Write new tokens into every pool: each token a number of its own, half more in each further pool."""
        table, batch = shadow.table, len(shadow.rows)
        tokens = torch.arange(self.next_token, self.next_token + batch * num_tokens).view(batch, num_tokens)
        self.next_token += batch * num_tokens
        for row, new in zip(shadow.rows, tokens.tolist(), strict=True):
            row += new
        skipped = max(0, table.base - columns)
        for i, pool in enumerate(self.pools):
            states = (tokens + i / 2)[:, None, skipped:, None].expand(-1, 1, -1, 2)
            pool.write(states, states, table, columns + skipped, columns + num_tokens)

    def cut(self, shadow: Shadow, lengths: list[int]) -> None:
        try:
            shadow.table.crop_rows(lengths)
        except CacheStateError:
            window = shadow.table.window
            assert min(lengths) < 0 or (window is not None and shadow.table.base > min(lengths) - window + 1)
            return
        shadow.rows = [row[:length] for row, length in zip(shadow.rows, lengths, strict=True)]

    def teardown(self) -> None:
        self.shadows.clear()
        gc.collect()
        self.allocator.check_integrity()
        alive = [(holder.rows, holder.retired) for holder in self.allocator.holders]
        assert self.allocator.num_free == self.allocator.num_blocks, alive


class CappedMachine(TableMachine):
    cap = CAP


class SlidingMachine(TableMachine):
    window = 6


class CappedSlidingMachine(TableMachine):
    window, cap = 6, CAP


@pytest.mark.parametrize(
    "machine", [TableMachine, CappedMachine, SlidingMachine, CappedSlidingMachine],
    ids=["growing", "capped", "sliding", "capped and sliding"],
)  # fmt: skip
def test_no_operation_sequence_loses_a_block_or_a_token(machine: type[TableMachine]) -> None:
    case = machine.TestCase
    case.settings = settings(
        max_examples=15, stateful_step_count=40, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    case().runTest()
