"""Keeping the accepted path of a draft: tokens move together inside the newest blocks, row by row."""

import pytest
import torch

from hf_kvopt import CacheStateError, PagedCache
from tests.helpers import WINDOW, states, tiny_config

PATHS = {
    "chain": [[0, 1, 2], [0], [0, 1, 2, 3, 4, 5, 6]],
    "tree": [[0, 2, 5], [0, 6], [0, 1, 3, 4]],
    "one row keeps nothing": [[], [0, 3], [0]],
}


def fed(kind: str, length: int, num_new: int, **options: object) -> tuple[PagedCache, list[list[torch.Tensor]]]:
    """A cache with `length` and then `num_new` tokens in three rows, and the same by layer: keys, values."""
    cache = PagedCache(config=tiny_config(kind), **options)
    cache.activate_past_recording()
    parts = [[states(3, n, seed=10 * layer + n) for layer in range(len(cache.layers))] for n in (length, num_new)]
    for part in parts:
        for layer, new in enumerate(part):
            cache.update(*new, layer)
    kept = [[torch.cat(pair, dim=2) for pair in zip(*both, strict=True)] for both in zip(*parts, strict=True)]
    return cache, kept


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("length", [5, 13, 16, 30])
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_each_row_holds_its_accepted_path_and_nothing_else(kind: str, length: int, paths: list[list[int]]) -> None:
    cache, fed_states = fed(kind, length, 7)
    cache.keep_paths(7, paths)
    columns = length + max(len(path) for path in paths)
    assert cache.get_seq_length() == columns
    for layer, both in zip(cache.layers, fed_states, strict=True):
        for held, given in zip((layer.keys, layer.values), both, strict=True):
            for row, path in enumerate(paths):
                wanted = torch.cat([given[row, :, :length], given[row, :, [length + node for node in path]]], dim=1)
                seen = min(wanted.shape[1], held.shape[2]) if kind == "full" else min(WINDOW - 1, wanted.shape[1])
                seen -= max(0, seen - held.shape[2])
                assert torch.equal(held.clone()[row, :, held.shape[2] - seen :], wanted[:, wanted.shape[1] - seen :])
    cache.check_integrity()


def test_paths_of_rows_that_begin_apart_are_found_where_each_row_stands() -> None:
    cache, fed_states = fed("full", 10, 7)
    paths = [[0, 2, 5], [0, 6], [0, 1, 3, 4]], [[1, 4], [0, 2, 3], [6]]
    cache.keep_paths(7, paths[0])
    more = [states(3, 7, seed=20 + layer) for layer in range(2)]
    for layer, new in enumerate(more):
        cache.update(*new, layer)
    cache.keep_paths(7, paths[1])
    for layer, both, new in zip(cache.layers, fed_states, more, strict=True):
        for held, first, second in zip((layer.keys, layer.values), both, new, strict=True):
            for row in range(3):
                kept = [first[row, :, :10], first[row][:, [10 + node for node in paths[0][row]]]]
                wanted = torch.cat([*kept, second[row][:, paths[1][row]]], dim=1)
                assert torch.equal(held.clone()[row, :, held.shape[2] - wanted.shape[1] :], wanted)


def test_columns_that_no_row_has_any_more_go() -> None:
    cache, _ = fed("full", 10, 4)
    cache.keep_paths(4, [[0, 1, 2, 3], [0], [0]])
    for layer in range(2):
        cache.update(*states(3, 4, seed=layer), layer)
    cache.keep_paths(4, [[0], [0, 1, 2, 3], [0]])
    assert cache.get_seq_length() == 15
    assert [table.lags for table in cache._tables.values()] == [[0, 0, 3]]


def test_blocks_shared_with_a_fork_are_left_alone() -> None:
    cache, _ = fed("full", 10, 7)
    cache.crop(-7)
    fork = cache.__deepcopy__({})
    before = fork.layers[0].keys.clone()
    for layer in range(2):
        cache.update(*states(3, 7, seed=layer), layer)
    cache.keep_paths(7, PATHS["tree"])
    assert torch.equal(fork.layers[0].keys.clone(), before)
    cache.check_integrity()


def test_rows_of_fixed_capacity_keep_one_path() -> None:
    cache, fed_states = fed("full", 10, 7, compileable=True, max_tokens=3 * 32)
    cache.keep_paths(7, [[0, 2, 5]] * 3)
    assert int(cache.get_seq_length()) == 13
    keys = fed_states[1][0]
    wanted = torch.cat([keys[:, :, :10], keys[:, :, [10, 12, 15]]], dim=2)
    assert torch.equal(cache.layers[1].keys.clone(), wanted)
    with pytest.raises(CacheStateError, match="keep the same tokens"):
        cache.keep_paths(2, [[0], [0, 1], [0]])
