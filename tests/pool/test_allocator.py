"""Which blocks are handed out, what the cap refuses, and what a relayout or a collection leaves."""

import gc

import pytest

from hf_kvopt.errors import KVOptError, OutOfBlocks
from hf_kvopt.pool.allocator import BlockAllocator, is_one_run
from hf_kvopt.pool.block_table import BlockTable
from tests.pool.tables import BLOCK, append, make_store, read


class Rows:
    """A holder that is nothing but its rows."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = list(rows)

    def held_rows(self) -> list[list[int]]:
        return self.rows

    def renumber(self, new_ids: dict[int, int]) -> None:
        self.rows = [[new_ids[block] for block in row] for row in self.rows]


def make_allocator(num_blocks: int, max_blocks: int | None = None) -> BlockAllocator:
    allocator = BlockAllocator(max_blocks=max_blocks, extent=0)
    allocator.relayout(num_blocks)
    return allocator


@pytest.mark.smoke
def test_neighbours_of_the_last_block_come_first() -> None:
    allocator = make_allocator(12)
    row, other = allocator.spread([2, 2])
    assert allocator.allocate(3, after=row[-1]) == [row[-1] + 1, row[-1] + 2, row[-1] + 3]
    assert allocator.allocate(1, after=other[-1]) == [other[-1] + 1]


def test_blocks_come_from_the_largest_run_where_the_neighbours_are_taken() -> None:
    allocator = make_allocator(10)
    blocks = allocator.allocate(10)
    allocator.release([blocks[1], *blocks[4:8]])
    assert allocator.allocate(2, after=0) == [1, 4]


def test_spread_leaves_each_piece_the_same_room_to_grow() -> None:
    pieces = make_allocator(20).spread([2, 1, 2, 1])
    assert [piece[0] for piece in pieces] == [0, 5, 10, 15]


def test_spread_leaves_room_to_the_row_in_front_of_it() -> None:
    allocator = make_allocator(12)
    (row,) = allocator.spread([2])
    (behind,) = allocator.spread([1])
    assert allocator.can_extend(row[-1], 4)
    assert behind[0] > row[-1] + 4


def test_runs_join_in_whatever_order_blocks_come_back() -> None:
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2, 4, 1, 3], [1, 3, 0, 4, 2]):
        allocator = make_allocator(5)
        allocator.allocate(5)
        for block in order:
            allocator.release([block])
            free = sum(count == 0 for count in allocator.refcounts)
            assert allocator.num_free == free
        assert allocator.allocate(5) == [0, 1, 2, 3, 4]


# Three of four blocks of 16 tokens are held, and two more are asked for.
SHORTAGE = (
    r"room for 32 more tokens was asked for: got 16 of 64 left \(in blocks of 16: 2 asked for, 1 of 4 left\); raise "
    r"max_tokens to 80 or more"
)


def test_a_refused_request_takes_nothing() -> None:
    allocator = make_allocator(4, max_blocks=4)
    held = Rows(allocator.allocate(3))
    allocator.holders.add(held)
    for request in (lambda: allocator.allocate(2), lambda: allocator.spread([1, 1]), lambda: allocator.ensure_free(2)):
        with pytest.raises(OutOfBlocks, match=SHORTAGE):
            request()
        allocator.check_integrity()
        assert (allocator.num_free, allocator.num_available) == (1, 1)


def test_a_pool_grows_up_to_its_cap_and_not_beyond() -> None:
    store = make_store(max_blocks=5, extent=16)
    for i in range(5 * BLOCK):
        append(store, [[i]])
    assert (store.allocator.num_blocks, store.allocator.num_available) == (5, 0)
    with pytest.raises(OutOfBlocks):
        append(store, [[99]])
    assert read(store) == [list(range(5 * BLOCK))]


def test_growth_is_in_proportion_so_that_copies_stay_rare() -> None:
    store, sizes = make_store(extent=2), set()
    for i in range(200 * BLOCK):
        append(store, [[i]])
        sizes.add(store.allocator.num_blocks)
    assert len(sizes) < 30
    assert read(store) == [list(range(200 * BLOCK))]


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_rows_stay_one_span_while_they_grow(batch: int) -> None:
    store = make_store()
    append(store, [[100 * row + i for i in range(7)] for row in range(batch)])
    for step in range(7, 60):
        append(store, [[100 * row + step] for row in range(batch)])
        assert store.table.span() is not None
    assert read(store) == [[100 * row + i for i in range(60)] for row in range(batch)]


def test_two_holders_that_grow_in_turn_are_mended_into_one_piece_each() -> None:
    store = make_store()
    other = BlockTable(store.allocator, BLOCK)
    for i in range(120):
        append(store, [[i]])
        append(store, [[1000 + i]], other)
        assert is_one_run(store.table.rows[0])
        assert is_one_run(other.rows[0])
    assert read(store) == [list(range(120))]
    assert read(store, other) == [[1000 + i for i in range(120)]]


def test_a_relayout_moves_every_holder_and_a_shared_block_once() -> None:
    store = make_store()
    append(store, [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]])
    store.table.select([0, 0, 1])
    twin = store.table.fork()
    used = store.num_used
    store.allocator.relayout(store.allocator.num_blocks + 9)
    assert store.num_used == used
    store.allocator.check_integrity()
    for table in (store.table, twin):
        assert read(store, table) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]]


def test_a_holder_collected_within_a_relayout_is_moved_once() -> None:
    store = make_store()
    append(store, [[1, 2, 3, 4, 5]])
    twins = [store.table.fork() for _ in range(20)]
    for i, twin in enumerate(twins):
        append(store, [[i] * 9], twin)

    class LosesTheTwins(Rows):
        calls = 0

        def renumber(self, new_ids: dict[int, int]) -> None:
            LosesTheTwins.calls += 1
            if LosesTheTwins.calls == 10:
                twins.clear()
                gc.collect()

    watchers = [LosesTheTwins() for _ in range(20)]
    for watcher in watchers:
        store.allocator.holders.add(watcher)
    del twin
    store.allocator.relayout(store.allocator.num_blocks + 900)
    store.allocator.check_integrity()
    assert (store.num_used, read(store)) == (2, [[1, 2, 3, 4, 5]])


@pytest.mark.smoke
def test_a_dropped_fork_gives_its_blocks_back() -> None:
    store = make_store()
    append(store, [[1, 2, 3, 4, 5]])
    fork = store.table.fork()
    append(store, [[6] * 11], fork)
    assert store.num_used == 5
    del fork
    store.allocator.reclaim()
    assert store.num_used == 2
    store.allocator.check_integrity()


def test_blocks_of_a_dropped_fork_move_along_until_they_are_taken_back() -> None:
    store = make_store()
    fork = store.table.fork()
    append(store, [[6] * 11], fork)
    append(store, [[1, 2, 3, 4, 5]])
    del fork
    assert store.allocator.abandoned
    store.allocator.relayout(store.allocator.num_blocks + 50)
    store.allocator.check_integrity()
    assert (store.num_used, read(store)) == (2, [[1, 2, 3, 4, 5]])


def test_a_fork_dropped_in_the_middle_of_a_replaced_window_gives_back_both() -> None:
    store = make_store(window=6)
    append(store, [[1, 2, 3]])
    store.table.reserve(1, store.table.clock + 9)
    assert store.table.retired is not None
    store = store._replace(table=BlockTable(store.allocator, BLOCK))
    store.allocator.reclaim()
    assert store.num_used == 0
    store.allocator.check_integrity()


def test_blocks_of_a_collected_holder_serve_a_request_at_the_cap() -> None:
    store = make_store(max_blocks=4)
    fork = store.table.fork()
    append(store, [[1] * 16], fork)
    del fork
    append(store, [[2] * 16])
    assert read(store) == [[2] * 16]


def test_releasing_a_free_block_is_an_error() -> None:
    allocator = make_allocator(2)
    with pytest.raises(KVOptError, match="block 1 was released twice"):
        allocator.release([1])


@pytest.mark.parametrize("damage", ["lost holder", "count too high", "free count wrong", "run lost"])
def test_check_integrity_sees_damage(damage: str) -> None:
    store = make_store()
    append(store, [[1, 2, 3, 4, 5]])
    store.allocator.check_integrity()
    if damage == "lost holder":
        store.table.rows[0].pop()
    elif damage == "count too high":
        store.allocator.refcounts[store.table.rows[0][0]] += 1
    elif damage == "free count wrong":
        store.allocator.free.num_free -= 1
    else:
        store.allocator.free.ends.clear()
    with pytest.raises(KVOptError, match="block accounting is broken"):
        store.allocator.check_integrity()
