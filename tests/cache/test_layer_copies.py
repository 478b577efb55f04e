"""Models that pass through layers several times append deep copies of cache layers: these belong to the same cache.

Every stream goes through transformers' DynamicCache too, whose layers are copied in the same way.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_kvopt import PagedCache, QuantizedPagedCache
from hf_kvopt.errors import CacheStateError
from tests.helpers import WINDOW, states, tiny_config

PASSES = 3
KINDS = ("full", "sliding", "mixed")
EDITS: dict[str, Callable[[DynamicCache], object]] = {
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "repeats": lambda cache: cache.batch_repeat_interleave(2),
    "selection": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "crop": lambda cache: cache.crop(-3),
}


def append_passes(cache: DynamicCache) -> None:
    """Append what later passes through all layers but the first write to, as a looped model does."""
    cache.layers += [copy.deepcopy(layer) for layer in cache.layers[1:] * (PASSES - 1)]


def feed(cache: DynamicCache, num_tokens: int, seed: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Append tokens to every layer, a layer in the middle last of all; return what each update hands out."""
    order = [*range(len(cache.layers))]
    order.append(order.pop(1))
    handed = {idx: cache.update(*states(batch, num_tokens, seed=100 * seed + idx), idx) for idx in order}
    return [(handed[idx][0].clone(), handed[idx][1].clone()) for idx in sorted(handed)]


def pair(kind: str, batch: int = 3, **options: object) -> tuple[PagedCache, DynamicCache]:
    """Make both caches with layers for all passes, and feed them a prompt and two tokens."""
    caches = PagedCache(config=tiny_config(kind), **options), DynamicCache(config=tiny_config(kind))
    for cache in caches:
        append_passes(cache)
        for seed, num_tokens in enumerate((21, 1, 1)):
            feed(cache, num_tokens, seed, batch)
    return caches


def assert_same(paged: PagedCache, dynamic: DynamicCache) -> None:
    for ours, theirs in zip(paged.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys.clone(), theirs.keys)
        assert torch.equal(ours.values.clone(), theirs.values)
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    paged.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_copies_follow_what_is_done_to_the_cache(kind: str, edit: Callable[[DynamicCache], object]) -> None:
    caches = pair(kind)
    for cache in caches:
        if edit is EDITS["crop"]:
            cache.activate_past_recording()
            feed(cache, 4, 8, 3)
        edit(cache)
    batch = len(caches[1].layers[0].keys)
    for ours, theirs in zip(*(feed(cache, 2, 9, batch) for cache in caches), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    if edit is not EDITS["crop"]:
        assert_same(*caches)
    caches[0].check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_of_the_cache_takes_the_copies_along(kind: str) -> None:
    caches = pair(kind)
    forks = [copy.deepcopy(cache) for cache in caches]
    for seed in (5, 6):
        for cache in caches:
            feed(cache, 17, seed, 3)
        for fork in forks:
            feed(fork, 3, 10 + seed, 3)
    assert_same(*caches)
    assert_same(*forks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clear", [PagedCache.reset, PagedCache.free], ids=["reset", "free"])
def test_copies_are_emptied_with_the_cache_and_used_again(kind: str, clear: Callable[[PagedCache], None]) -> None:
    paged, _ = pair(kind)
    clear(paged)
    assert paged.stats().used_blocks == 0
    assert all(layer.get_seq_length() == 0 for layer in paged.layers)
    dynamic = DynamicCache(config=tiny_config(kind))
    append_passes(dynamic)
    for cache in (paged, dynamic):
        feed(cache, 9, 1, 2)
    assert_same(paged, dynamic)


def test_copies_have_blocks_in_the_table_of_their_kind_and_pools_of_their_own() -> None:
    paged, _ = pair("mixed")
    assert len({id(layer.table) for layer in paged.layers}) == 2
    assert len({id(layer.pool) for layer in paged.layers}) == len(paged.layers) == 3 + 2 * (PASSES - 1)
    alone = PagedCache(config=tiny_config("mixed"))
    for seed, num_tokens in enumerate((21, 1, 1)):
        feed(alone, num_tokens, seed, 3)
    # Blocks are counted once a table, bytes once a layer.
    assert paged.stats().used_blocks == alone.stats().used_blocks
    assert paged.stats().num_tokens == alone.stats().num_tokens
    assert paged.stats().reserved_bytes > 2 * alone.stats().reserved_bytes


def test_copies_are_stored_in_the_format_of_their_original() -> None:
    cache = QuantizedPagedCache(config=tiny_config("mixed"), layer_formats={1: "int4"}, guard="off")
    append_passes(cache)
    names = [layer.format.name for layer in cache.layers]
    assert names == ["native", "int4", "native", "int4", "native", "int4", "native"]
    feed(cache, 21, 0, 3)
    same = states(3, 1, seed=7)
    for idx in range(len(cache.layers)):
        cache.update(*same, idx)
    assert torch.equal(cache.layers[1].keys[:, :, -1].clone(), cache.layers[3].keys[:, :, -1].clone())


def test_copies_of_fixed_capacity_hold_the_same_keys() -> None:
    fixed, dynamic = pair("full", compileable=True, max_tokens=3 * 48)
    for ours, theirs in zip(fixed.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys.clone(), theirs.keys)
    for cache in (fixed, dynamic):
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.crop(-2)
        feed(cache, 3, 5, 3)
    for ours, theirs in zip(fixed.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys.clone(), theirs.keys)
    assert [int(layer.length) for layer in copy.deepcopy(fixed).layers] == [24] * len(fixed.layers)


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
@pytest.mark.parametrize("options", [{}, {"compileable": True, "max_tokens": 96}], ids=["growing", "fixed"])
def test_a_layer_that_holds_tokens_is_not_copied_alone(copier: Callable, options: dict[str, object]) -> None:
    cache = PagedCache(config=tiny_config("full"), **options)
    for idx in range(2):
        cache.update(*states(1, 5), idx)
    with pytest.raises(CacheStateError, match=r"got a layer that holds 5 tokens.*copy.deepcopy\(cache\)"):
        copier(cache.layers[0])
    for idx in range(2):
        cache.update(*states(1, 2, seed=1), idx)
    assert cache.get_seq_length() == 7
    cache.reset()
    assert copier(cache.layers[0]).table is cache.layers[0].table


def test_a_layer_of_another_cache_is_refused_before_it_is_written() -> None:
    cache, other = PagedCache(config=tiny_config("full")), PagedCache(config=tiny_config("full"))
    cache.layers = copy.deepcopy(other.layers)
    with pytest.raises(CacheStateError, match="layer 0 belongs to another cache"):
        cache.update(*states(1, 5), 0)
    assert other.get_seq_length() == 0
    assert other.stats().used_blocks == 0


def test_a_copy_of_a_cache_and_of_its_layer_in_one_go_stay_together() -> None:
    cache = PagedCache(config=tiny_config("full"))
    for idx in range(2):
        cache.update(*states(1, 5), idx)
    twin, layer = copy.deepcopy((cache, cache.layers[1]))
    assert layer is twin.layers[1]


def test_a_window_shorter_than_a_chunk_is_replaced_in_every_pass() -> None:
    caches = PagedCache(config=tiny_config("mixed")), DynamicCache(config=tiny_config("mixed"))
    for cache in caches:
        append_passes(cache)
    for seed, num_tokens in enumerate((7, WINDOW + 3, 1, WINDOW, 2)):
        for ours, theirs in zip(*(feed(cache, num_tokens, seed, 2) for cache in caches), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
    assert_same(*caches)
