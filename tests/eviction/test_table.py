"""A table that evicts, through random lives, against lists of tokens."""

import random
from dataclasses import dataclass, field, replace

import pytest
import torch

from hf_kvopt import CacheStateError, OutOfBlocks, SinkRecent, SinkRecentPeriodic, UnsupportedModel
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.evicting import EvictingTable
from hf_kvopt.pool.storage import KVPool
from tests.eviction.reference import kept

BLOCK = 4
PAD = -1.0
POLICIES = [SinkRecent(2, 5), SinkRecent(0, 4), SinkRecent(8, 8), SinkRecentPeriodic(3, 6, 11)]


@dataclass
class Row:
    """The text of a row, and which of its tokens are held."""

    text: list[float]
    pads: int = 0
    held: set[int] = field(default_factory=set)

    def copy(self):
        return replace(self, text=list(self.text), held=set(self.held))

    def begin(self, policy):
        self.held &= set(kept(policy, len(self.text), BLOCK))

    def append(self, tokens):
        self.held |= set(range(len(self.text), len(self.text) + len(tokens)))
        self.text += tokens

    def can_crop(self, policy, count):
        left = len(self.text) - count
        return left >= 0 and set(kept(policy, left, BLOCK)) <= self.held

    def crop(self, count):
        del self.text[len(self.text) - count :]
        self.held = {token for token in self.held if token < len(self.text)}


@dataclass
class Life:
    """A table over one pool of numbers, and its rows as lists."""

    policy: object
    max_blocks: int | None = None
    rows: list[Row] = field(default_factory=list)
    counter: int = 0

    def __post_init__(self):
        self.allocator = BlockAllocator(max_blocks=self.max_blocks, extent=3, block_size=BLOCK)
        states = torch.zeros(1, 1, 0, 1)
        self.pool = KVPool(states, states, BLOCK, 0)
        self.allocator.pools.append(self.pool)
        self.table = EvictingTable(self.allocator, BLOCK, self.policy)

    def forward(self, num_tokens, pads=None):
        """Write as a layer does; `pads` of the first forward."""
        table = self.table
        batch = len(self.rows) or len(pads)
        step = table.advance(batch, table.clock, num_tokens)
        if not self.rows:
            self.rows = [Row([], pads=count) for count in pads]
        states = torch.full((batch, 1, num_tokens, 1), PAD)
        for i, row in enumerate(self.rows):
            row.begin(self.policy)
            first = pads[i] if pads else 0
            fresh = [float(self.counter + j + 1) for j in range(num_tokens - first)]
            self.counter += len(fresh)
            row.append(fresh)
            states[i, 0, first:, 0] = torch.tensor(fresh)
        self.pool.write(states, -states, table, step.start, step.stop)
        if pads:
            table.note_padding(pads)
        return step

    def check(self):
        table = self.table
        self.allocator.check_integrity()
        if not self.rows:
            return
        columns = table.clock - table.base
        starts = table.starts(0, columns) or [0] * len(self.rows)
        keys, values = (plane.read(table, columns)[:, 0, :, 0] for plane in self.pool.planes)
        for i, row in enumerate(self.rows):
            got = [x for x in keys[i, starts[i] :].tolist() if x != PAD]
            assert got == [row.text[t] for t in sorted(row.held)]
            assert [-x for x in values[i, starts[i] :].tolist() if x != -PAD] == got


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_lives_hold_what_the_policy_keeps(policy, seed):
    draw = random.Random(seed)
    life = Life(policy)
    for _ in range(3):
        pads = [0, *(draw.choice([0, 1, 4, 6, 9]) for _ in range(draw.randrange(3)))]
        life.forward(draw.randint(max(pads) + 1, 40), pads)
        for _ in range(60):
            _act(draw, life)
            life.check()
        life.table.clear()
        life.rows = []
        assert life.allocator.num_free == life.allocator.num_blocks


def _act(draw, life):
    action = draw.choices(["step", "chunk", "crop", "select", "fork", "fail"], [12, 2, 2, 1, 1, 1])[0]
    if action == "step":
        life.forward(1)
    elif action == "chunk":
        life.forward(draw.randint(2, 13))
    elif action == "crop":
        count = draw.choice([1, 1, 2, 5, 12])
        if all(row.can_crop(life.policy, count) for row in life.rows):
            life.table.crop(count)
            for row in life.rows:
                row.crop(count)
        elif all(count <= len(row.text) for row in life.rows):
            with pytest.raises(CacheStateError, match="dropped its tokens"):
                life.table.crop(count)
    elif action == "select":
        chosen = [draw.randrange(len(life.rows)) for _ in range(draw.randint(1, 3))]
        life.table.select(chosen)
        life.rows = [life.rows[i].copy() for i in chosen]
    elif action == "fork":
        fork, rows = life.table.fork(), [row.copy() for row in life.rows]
        life.forward(draw.randint(1, 9))  # the fork keeps what it holds, and then goes on instead
        life.table.clear()
        life.table, life.rows = fork, rows
    else:
        before = life.table.clock
        rows = [row.copy() for row in life.rows]
        for row in rows:
            row.begin(life.policy)
        life.forward(draw.randint(1, 9))
        life.table.rollback(before)
        life.rows = rows


def test_a_capped_pool_is_enough_for_what_is_kept():
    life = Life(SinkRecent(4, 8), max_blocks=2 * 5)
    life.forward(10, [0, 3])
    for _ in range(200):
        life.forward(1)
        life.check()
    with pytest.raises(OutOfBlocks):
        life.forward(60)
    life.check()
    life.forward(1)
    life.check()


def test_moving_rows_up_copies_blocks_that_others_hold():
    life = Life(SinkRecent(4, 8))
    life.forward(30, [0, 3])
    fork, rows = life.table.fork(), [row.copy() for row in life.rows]
    life.forward(1)
    life.check()
    life.table.clear()
    life.table, life.rows = fork, rows
    life.check()


def test_moving_rows_up_without_room_for_copies_changes_nothing():
    life = Life(SinkRecent(4, 8), max_blocks=16)
    life.forward(30, [0, 3])
    other = life.table.fork()
    with pytest.raises(OutOfBlocks):
        life.forward(1)
    life.check()
    other.clear()
    life.forward(1)
    life.check()


def test_most_of_a_long_prompt_is_given_back():
    life = Life(SinkRecent(4, 8))
    life.forward(1000, [0])
    before = life.pool.num_bytes
    life.forward(1)
    assert life.pool.num_bytes < before / 10
    life.check()


def test_chunks_of_a_prompt_do_not_move_the_pools_to_and_fro(monkeypatch):
    life = Life(SinkRecent(4, 8))
    life.forward(100, [0])
    life.forward(100)
    moves = []
    relayout = life.allocator.relayout
    monkeypatch.setattr(life.allocator, "relayout", lambda size: moves.append(size) or relayout(size))
    for _ in range(10):
        life.forward(100)
        life.check()
    assert not moves


def test_a_layer_that_is_behind_the_others_is_refused():
    life = Life(SinkRecent(4, 8))
    life.forward(30, [0])
    life.forward(1)
    with pytest.raises(UnsupportedModel, match="goes on from column 0 to 5 where others hold 31"):
        life.table.advance(1, 0, 5)
    life.check()


def test_what_a_mask_hides_behind_dropped_tokens_is_refused():
    life = Life(SinkRecent(4, 8))
    life.forward(30, [0, 0])
    life.forward(1)
    with pytest.raises(CacheStateError, match="hides the first 5 tokens of row 1"):
        life.table.note_padding([0, 5])
    life.check()


def test_a_plan_is_made_once_and_kept_until_it_is_carried_out():
    life = Life(SinkRecent(4, 8))
    life.forward(31, [0])
    planned = life.table.next_start(31)
    assert planned > life.table.base == 0
    life.table.crop(3)
    life.rows[0].crop(3)
    assert life.table.next_start(28) == 16
    step = life.forward(1)
    assert life.table.base == 16
    assert step.kv_len == 29 - 16
    life.check()
