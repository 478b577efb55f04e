"""What stats() says at each step of a cache's life, held against what was fed."""

import copy
import gc

import pytest
import torch

from hf_kvopt import PagedCache
from tests.helpers import states, tiny_config

TOKEN_BYTES = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 numbers in float32


def fed(batch: int, num_tokens: int, layers: int = 2, **options: object) -> PagedCache:
    cache = PagedCache(**options)
    for layer in range(layers):
        cache.update(*states(batch, num_tokens), layer)
    return cache


def test_an_empty_cache_holds_nothing() -> None:
    assert PagedCache().stats() == (0,) * 10


@pytest.mark.smoke
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("num_tokens", range(1, 36, 3))
def test_used_blocks_waste_and_bytes_follow_from_the_lengths(num_tokens: int, block_size: int) -> None:
    stats = fed(3, num_tokens, block_size=block_size).stats()
    row_blocks = -(-num_tokens // block_size)
    assert stats.used_blocks == 3 * row_blocks
    assert stats.used_blocks + stats.free_blocks == stats.num_blocks
    assert stats.num_tokens == 3 * num_tokens
    assert stats.waste_tokens == 3 * (row_blocks * block_size - num_tokens)
    assert stats.used_bytes == 2 * stats.used_blocks * block_size * TOKEN_BYTES
    assert stats.reserved_bytes == 2 * stats.num_blocks * block_size * TOKEN_BYTES


def test_a_shared_block_is_used_once_and_its_slack_wasted_once() -> None:
    cache = fed(1, 21)
    cache.batch_repeat_interleave(4)
    stats = cache.stats()
    assert (stats.used_blocks, stats.shared_blocks, stats.num_tokens, stats.waste_tokens) == (2, 2, 84, 11)
    for layer in range(2):
        cache.update(*states(4, 1), layer)
    stats = cache.stats()
    assert (stats.used_blocks, stats.shared_blocks, stats.waste_tokens) == (5, 1, 4 * 10)


def test_sliding_and_full_layers_are_summed() -> None:
    cache = PagedCache(config=tiny_config("mixed"))
    for layer in range(3):
        cache.update(*states(1, 100), layer)
    stats = cache.stats()
    assert stats.used_blocks == 7 + 2
    assert stats.used_bytes == (7 + 2 * 2) * 16 * TOKEN_BYTES
    assert stats.used_blocks + stats.free_blocks == stats.num_blocks


def test_crop_reset_and_free_give_back_what_they_say() -> None:
    cache = fed(2, 40)
    cache.crop(-30)
    assert (cache.stats().used_blocks, cache.stats().num_tokens) == (2, 20)
    reserved = cache.stats().reserved_bytes
    cache.reset()
    assert (cache.stats().used_blocks, cache.stats().reserved_bytes) == (0, reserved)
    cache.free()
    assert cache.stats() == (0,) * 10


def test_a_cap_bounds_what_is_reserved() -> None:
    cache = fed(2, 40, max_tokens=100)
    assert cache.stats().num_blocks <= 7


def test_blocks_of_a_fork_count_until_it_is_dropped() -> None:
    cache = fed(1, 40)
    fork = copy.deepcopy(cache)
    for layer in range(2):
        fork.update(*states(1, 30), layer)
    assert cache.stats().used_blocks == 3 + 3
    del fork
    gc.collect()
    assert cache.stats().used_blocks == 3
    assert cache.stats().shared_blocks == 0


def test_fallbacks_of_all_layers_are_counted() -> None:
    cache = fed(1, 5)
    for layer in cache.layers:
        assert torch.isfinite(layer.keys).all()
        assert torch.isfinite(layer.values).all()
    assert cache.stats().dense_fallbacks >= 4


@pytest.mark.parametrize("compileable", [False, True], ids=["growing", "fixed capacity"])
def test_asking_changes_nothing_that_others_read(compileable: bool) -> None:
    cache = PagedCache(max_tokens=128, compileable=compileable)
    cache.update(*states(2, 21), 0)
    (table,) = cache._tables.values()
    before = table.lags, list(table.lags), table.version
    table.lags = asked = Untouchable(table.lags)
    assert cache.stats().num_tokens == 42
    assert table.lags is asked
    assert (before[1], before[2]) == (list(table.lags), table.version)


class Untouchable(list[int]):
    """Lags that nobody may write to."""

    def __setitem__(self, *_: object) -> None:
        raise AssertionError("lags of a live table were written to")
