"""Runs of adjacent rows that begin with the same blocks, and when a table lets them be read together."""

import random

import pytest
import torch

from hf_kvopt.kernels.calls import KVSpec, KVView, Stored
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.runs import Runs, shared_tokens

CPU = torch.device("cpu")


def test_runs_save_the_most_reads():
    prefix, other = [7, 8, 9], [4, 5]
    assert Runs.of([[*prefix, 1], [*prefix, 2], [*prefix, 3]]) == Runs(3, [3])
    assert Runs.of([[*prefix, 1], [*prefix, 2], [*other, 3], [*other, 0]]) == Runs(2, [3, 2])
    assert Runs.of([[*prefix, *other, 1], [*prefix, *other, 2], prefix, prefix]) == Runs(4, [3])
    assert Runs.of([[7, *other, 1, 2], [7, *other, 1, 3], [7, 0, 6], [7, 0, 6]]) == Runs(2, [4, 3])


@pytest.mark.parametrize("rows", [[], [[]], [[1]], [[], []], [[1], [2]], [[1], [2], [2]]], ids=str)
def test_rows_without_a_common_beginning_are_alone(rows):
    assert Runs.of(rows) == Runs(1, [0] * len(rows))


def test_common_beginnings_are_those_of_a_search_block_by_block():
    draw = random.Random(0)
    for _ in range(300):
        rows = [[draw.randrange(2) for _ in range(draw.randrange(6))] for _ in range(draw.choice((2, 3, 4, 6)))]
        size, blocks = Runs.of(rows)
        for i, count in enumerate(blocks):
            run = rows[i * size : (i + 1) * size]
            heads = {tuple(row[:count]) for row in run}
            assert len(heads) == 1
            assert size == 1 or min(map(len, run)) == count or len({tuple(row[: count + 1]) for row in run}) > 1


def test_shared_tokens_are_whole_tiles_that_all_queries_see():
    runs = Runs(2, [20, 3])
    assert shared_tokens(runs, 16, [330, 321, 50, 60], CPU).tokens.tolist() == [320, 0]
    assert shared_tokens(runs, 16, [330, 319, 50, 60], CPU).tokens.tolist() == [256, 0]
    assert shared_tokens(runs, 32, [1000, 1000, 95, 96], CPU).tokens.tolist() == [640, 64]
    assert shared_tokens(runs, 16, [63, 70, 50, -1], CPU) is None


def table_of(batch: int, length: int) -> BlockTable:
    table = BlockTable(BlockAllocator(), 16)
    table.reserve(batch, length)
    return table


def asked(table: BlockTable, q_len: int = 1, starts=None):
    shared = table.shared_blocks(table.clock - table.base, q_len, starts, CPU)
    return None if shared is None else shared.tokens.tolist()


def test_repeated_rows_share_what_they_do_not_write():
    table = table_of(1, 200)
    assert asked(table) is None
    table.select([0, 0, 0, 0])
    assert asked(table) == [192]
    table.reserve(4, 201)  # the half full block was copied
    assert asked(table) == [192]
    table.reserve(4, 300)
    assert asked(table) == [192]
    assert asked(table, q_len=105) == [192]
    assert asked(table, q_len=109) == [128]
    table.crop(200)
    assert asked(table) == [64]
    assert asked(table, q_len=40) is None


def test_beams_share_what_all_of_them_come_from():
    table = table_of(2, 128)
    table.select([0, 0, 1, 1])
    table.reserve(4, 200)
    assert asked(table) == [128, 128]
    table.select([0, 0, 0, 0])
    assert asked(table) == [192]
    table.select([0, 1])
    table.reserve(2, 201)
    table.select([1, 0])
    assert asked(table) == [192]


def test_other_rows_are_asked_for_anew_only_when_they_change():
    table = table_of(1, 200)
    table.select([0, 0])
    first = table.shared_blocks(200, 1, None, CPU)
    assert table.shared_blocks(200, 1, None, CPU) is first
    table.reserve(2, 201)
    assert table.shared_blocks(201, 1, None, CPU) is not first


def test_rows_that_begin_later_share_by_token_and_padding_must_be_the_same():
    table = table_of(1, 200)
    table.select([0, 0])
    table.crop_rows([200, 150])
    table.reserve(2, 201)
    assert table.is_ragged
    assert asked(table, starts=table.starts(0, 201)) == [128]
    assert asked(table) == [128]
    assert asked(table, starts=[0, 60]) is None
    assert asked(table, starts=[10, 60]) == [128]
    assert asked(table, starts=torch.tensor([0, 50])) is None
    even = table_of(1, 200)
    even.select([0, 0])
    assert asked(even, starts=[0, 0]) == [192]
    assert asked(even, starts=[3, 3]) == [192]
    assert asked(even, starts=[0, 3]) is None
    even.select([0, 0, 0, 0])
    assert asked(even, starts=[3, 3, 0, 0]) is None


def test_a_layer_that_holds_less_shares_less():
    table = table_of(1, 200)
    table.select([0, 0])
    assert table.shared_blocks(100, 1, None, CPU).tokens.tolist() == [64]


def test_what_windows_hide_is_read_row_by_row():
    table = table_of(1, 200)
    table.select([0, 0])
    codes = torch.zeros(20, 16, 1, 8)
    view = KVView(Stored(codes, None), table, KVSpec((2, 1, 200, 8), torch.float32, "native"), 0, table.version)
    assert view.shared_blocks(1, Pattern(1.0)).tokens.tolist() == [192]
    assert view.shared_blocks(1, Pattern(1.0, window=200)).tokens.tolist() == [192]
    assert view.shared_blocks(1, Pattern(1.0, window=199)) is None
    assert view._replace(skip=1).shared_blocks(1, Pattern(1.0)) is None
