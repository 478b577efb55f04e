"""Reserve, crop, select, fork and roll back: what rows read afterwards, and which blocks are held for them."""

import gc

import pytest
import torch

from hf_kvopt.errors import CacheStateError, OutOfBlocks
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.storage import KVPool
from tests.pool.tables import BLOCK, Store, append, make_store, read


def count(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


@pytest.mark.smoke
def test_reserve_is_idempotent_within_a_step() -> None:
    store = make_store()
    store.table.reserve(2, 5)
    rows, version = [list(row) for row in store.table.rows], store.table.version
    for _ in range(3):
        store.table.reserve(2, 5)
    assert (store.table.rows, store.table.version, store.table.lengths) == (rows, version, [5, 5])


@pytest.mark.smoke
def test_a_write_into_a_shared_block_copies_it_in_every_pool() -> None:
    store = make_store()
    second = KVPool(torch.zeros(1, 3, 0, 2), torch.zeros(1, 3, 0, 2), BLOCK, store.allocator.num_blocks)
    store.allocator.pools.append(second)
    append(store, [count(0, 6)])
    states = torch.arange(36.0).view(1, 3, 6, 2)
    second.write(states, states, store.table, 0, 6)
    fork = store.table.fork()
    append(store, [[100]], fork)
    append(store, [[200]])
    assert read(store) == [[*count(0, 6), 200]]
    assert read(store, fork) == [[*count(0, 6), 100]]
    for table in (store.table, fork):
        assert torch.equal(second.values.read(table, 6), states)
    assert store.table.rows[0][0] == fork.rows[0][0]
    assert store.table.rows[0][1] != fork.rows[0][1]


def test_full_blocks_are_shared_for_good_and_never_copied() -> None:
    store = make_store()
    append(store, [count(0, 8)])
    fork = store.table.fork()
    append(store, [[100]], fork)
    assert store.num_used == 3
    assert fork.rows[0][:2] == store.table.rows[0]


def test_the_last_holder_of_a_half_full_block_keeps_it() -> None:
    store = make_store()
    append(store, [count(0, 6)])
    block = store.table.rows[0][1]
    store.table.select([0, 0, 0])
    append(store, [[7], [8], [9]])
    assert [row[1] == block for row in store.table.rows].count(True) == 1
    assert read(store) == [[*count(0, 6), 7], [*count(0, 6), 8], [*count(0, 6), 9]]
    assert store.num_used == 4


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [1, 1, 0], [1]], ids=["swap", "first twice", "grow", "shrink"])
def test_select_then_append_leaves_each_row_its_own_tokens(order: list[int]) -> None:
    store = make_store()
    append(store, [count(0, 6), count(10, 16)])
    store.table.select(order)
    append(store, [[100 + i] for i in range(len(order))])
    rows = [count(0, 6), count(10, 16)]
    assert read(store) == [[*rows[i], 100 + place] for place, i in enumerate(order)]


@pytest.mark.parametrize("keep", range(13))
def test_crop_then_append_reads_right_at_every_length(keep: int) -> None:
    store = make_store()
    append(store, [count(0, 12), count(20, 32)])
    store.table.crop(12 - keep)
    assert store.num_used == 2 * -(-keep // BLOCK)
    append(store, [count(50, 57), count(60, 67)])
    assert read(store) == [[*count(0, keep), *count(50, 57)], [*count(20, 20 + keep), *count(60, 67)]]
    store.allocator.check_integrity()


def test_crop_of_a_fork_leaves_its_parent_alone() -> None:
    store = make_store()
    append(store, [count(0, 10)])
    fork = store.table.fork()
    fork.crop(7)
    append(store, [count(70, 79)], fork)
    assert read(store) == [count(0, 10)]
    assert read(store, fork) == [[0, 1, 2, *count(70, 79)]]


def test_rows_of_unlike_length_grow_each_behind_its_own_end() -> None:
    store = make_store()
    append(store, [count(0, 9), count(20, 29), count(40, 49)])
    store.table.crop_rows([9, 4, 7])
    append(store, [[100, 101], [200, 201], [300, 301]])
    assert read(store) == [
        [*count(0, 9), 100, 101],
        [*count(20, 24), 200, 201],
        [*count(40, 47), 300, 301],
    ]
    assert store.table.rows_on(torch.device("cpu"))[1].tolist() == [11, 6, 9]
    assert store.table.span() is None
    store.allocator.check_integrity()


def test_more_than_is_held_cannot_be_cropped() -> None:
    store = make_store()
    append(store, [count(0, 5)])
    with pytest.raises(CacheStateError, match="cannot crop to -1 tokens: got a cache that holds tokens 0 to 5"):
        store.table.crop(6)
    assert read(store) == [count(0, 5)]


def test_another_batch_size_is_refused() -> None:
    store = make_store()
    append(store, [count(0, 5)])
    with pytest.raises(CacheStateError, match=r"holds 1 rows: got a batch of 2; call cache\.reset"):
        store.table.reserve(2, 6)
    assert read(store) == [count(0, 5)]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("chunk", [1, 3, 7, 31])
def test_a_sliding_table_shows_a_window_and_holds_little_more(window: int, chunk: int) -> None:
    store, most = make_store(window=window), -(-(window + chunk) // BLOCK) + 1
    for start in range(0, 40 * chunk, chunk):
        append(store, [count(start, start + chunk), count(5000 + start, 5000 + start + chunk)])
        table, end = store.table, start + chunk
        first = table.visible_start(table.clock)
        assert first == max(0, end - window + 1)
        assert [row[first - table.base :] for row in read(store)] == [
            count(first, end),
            count(5000 + first, 5000 + end),
        ]
        assert all(len(row) <= most for row in table.rows)
    store.allocator.check_integrity()


@pytest.mark.smoke
def test_a_sliding_table_stays_bounded_over_thousands_of_steps() -> None:
    store = make_store(window=10)
    append(store, [[0, 1, 2]])
    for i in range(3, 3000):
        append(store, [[i]])
    assert store.allocator.num_blocks < 30
    assert len(store.table.rows[0]) <= 4
    assert read(store)[0][-10:] == count(2990, 3000)


def test_a_recording_table_keeps_its_past_until_the_next_crop() -> None:
    store = make_store(window=6)
    append(store, [count(0, 9)])
    store.table.record_past = True
    append(store, [count(9, 20)])
    append(store, [count(20, 31)])
    store.table.crop(22)
    assert read(store)[0][-5:] == count(4, 9)
    append(store, [count(50, 60)])
    store.table.crop(0)
    assert len(store.table.rows[0]) <= 3
    assert read(store)[0][-6:] == count(54, 60)


def test_a_window_that_was_dropped_cannot_be_cropped_to() -> None:
    store = make_store(window=6)
    append(store, [count(0, 30)])
    with pytest.raises(CacheStateError, match=r"cannot crop to 22 tokens.*activate_past_recording"):
        store.table.crop(8)


@pytest.mark.parametrize("removed", range(6))
def test_a_crop_never_shows_slots_that_a_replaced_window_left_unwritten(removed: int) -> None:
    store = make_store(window=6)
    append(store, [count(0, 10)])
    append(store, [count(10, 16)])  # as long as the window: starts on new blocks
    try:
        store.table.crop(removed)
    except CacheStateError:
        return
    table = store.table
    first = table.visible_start(table.clock)
    assert read(store)[0][first - table.base :] == count(first, 16 - removed)


def _failing_forward(store: Store, num_tokens: int) -> None:
    clock = store.table.clock
    append(store, [[9] * num_tokens for _ in store.table.rows])
    store.table.rollback(clock)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 9, 40])
@pytest.mark.parametrize("window", [None, 6], ids=["full", "sliding"])
def test_a_rolled_back_step_leaves_what_was_there(window: int | None, num_tokens: int) -> None:
    store = make_store(window=window)
    append(store, [count(0, 7), count(20, 27)])
    append(store, [[7], [27]])
    _failing_forward(store, num_tokens)
    table = store.table
    first = table.visible_start(table.clock)
    assert [row[first - table.base :] for row in read(store)] == [count(first, 8), count(20 + first, 28)]
    append(store, [[8], [28]])
    first = table.visible_start(table.clock)
    assert [row[first - table.base :] for row in read(store)] == [count(first, 9), count(20 + first, 29)]
    store.allocator.check_integrity()


def test_a_first_step_that_is_rolled_back_leaves_an_empty_table() -> None:
    store = make_store()
    store.table.reserve(3, 9)
    store.table.rollback(0)
    assert (store.num_used, store.table.batch_size) == (0, 0)
    append(store, [[1]])
    assert read(store) == [[1]]


def test_running_out_of_blocks_leaves_rows_and_shares_as_they_were() -> None:
    store = make_store(max_blocks=5)
    append(store, [count(0, 6), count(10, 16)])
    store.table.select([0, 0])
    with pytest.raises(OutOfBlocks):
        append(store, [count(0, 13), count(0, 13)])
    store.allocator.check_integrity()
    assert (store.num_used, read(store)) == (2, [count(0, 6), count(0, 6)])
    append(store, [[7], [8]])
    assert read(store) == [[*count(0, 6), 7], [*count(0, 6), 8]]


def test_a_copy_on_write_counts_against_the_cap() -> None:
    store = make_store(max_blocks=2)
    append(store, [count(0, 6)])
    fork = store.table.fork()
    with pytest.raises(OutOfBlocks):
        append(store, [[7]], fork)
    assert read(store) == read(store, fork) == [count(0, 6)]


def test_slots_and_block_table_name_the_same_places() -> None:
    store = make_store()
    append(store, [count(0, 9), count(20, 29)])
    table, device = store.table, torch.device("cpu")
    slots = table.slots(0, 9, device)
    positions = torch.arange(9)
    block_table, lens, _ = table.rows_on(device)
    assert torch.equal(slots, block_table.long()[:, positions // BLOCK] * BLOCK + positions % BLOCK)
    assert block_table.dtype == lens.dtype == torch.int32


def test_a_table_that_is_collected_gives_back_also_the_rows_of_its_forks() -> None:
    store = make_store()
    append(store, [count(0, 9)])
    forks = [store.table.fork() for _ in range(3)]
    forks = [fork.fork() for fork in forks]
    allocator = store.allocator
    del store, forks
    gc.collect()
    allocator.check_integrity()
    assert allocator.num_free == allocator.num_blocks


def test_a_table_without_rows_reads_as_nothing() -> None:
    table = BlockTable(make_store().allocator, BLOCK)
    assert (table.batch_size, table.clock, table.span()) == (0, 0, None)


def test_a_row_cut_to_nothing_beside_others_leaves_no_even_rows() -> None:
    table = BlockTable(BlockAllocator(), 4)
    table.reserve(3, 8)
    table.crop_rows([8, 0, 8])
    assert table.span() is None
    table.crop_rows([0, 0, 0])
    assert table.span() is None
    assert (table.clock, table.lengths) == (8, [0, 0, 0])


def test_columns_that_no_row_fills_any_more_can_be_read() -> None:
    store = make_store()
    append(store, [count(0, 3), count(20, 23)])
    store.table.crop_rows([1, 0])
    store.table.crop_rows([0, 0])  # the second row lost nothing, so that the column stays
    assert (store.table.clock, store.table.lengths, store.num_used) == (1, [0, 0], 0)
    assert read(store) == [[], []]
    append(store, [[7], [8]])
    assert read(store) == [[7], [8]]
