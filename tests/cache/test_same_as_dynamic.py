"""The same stream of updates through a PagedCache and transformers' DynamicCache: what is stored and what is said."""

import pytest
import torch
from transformers import DynamicCache

from hf_kvopt import PagedCache
from tests.helpers import WINDOW, states, tiny_config

BLOCK = 16
LENGTHS = range(1, 2 * BLOCK + 4)


def feed(cache: DynamicCache, steps: list[int], batch: int = 2) -> None:
    """Append chunks of `steps` tokens to both layers."""
    for step, num_tokens in enumerate(steps):
        for layer in range(2):
            cache.update(*states(batch, num_tokens, seed=10 * step + layer), layer)


def pair(steps: list[int], kind: str = "full", **options: object) -> tuple[PagedCache, DynamicCache]:
    """Feed the same steps to both caches."""
    caches = PagedCache(config=tiny_config(kind), **options), DynamicCache(config=tiny_config(kind))
    for cache in caches:
        feed(cache, steps)
    return caches


def assert_same(paged: PagedCache, dynamic: DynamicCache) -> None:
    for ours, theirs in zip(paged.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys.clone(), theirs.keys)
        assert torch.equal(ours.values.clone(), theirs.values)
        for query_length in (1, 5):
            assert ours.get_mask_sizes(query_length) == theirs.get_mask_sizes(query_length)
    assert paged.get_seq_length() == dynamic.get_seq_length()
    paged.check_integrity()


@pytest.mark.smoke
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_of_any_length_and_two_more_tokens_are_stored_exactly(length: int) -> None:
    assert_same(*pair([length]))
    assert_same(*pair([length, 1, 1]))


@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_one_by_one_are_stored_exactly(length: int) -> None:
    assert_same(*pair([1] * length))


@pytest.mark.parametrize("steps", [[3, 17, 16, 1, 40], [16, 16, 16], [15, 2, 15], [1, 64, 1], [50, 5]], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
def test_chunks_are_stored_exactly(steps: list[int], block_size: int) -> None:
    assert_same(*pair(steps, block_size=block_size))


@pytest.mark.parametrize("steps", [[0, 5], [5, 0], [5, 0, 1], [16, 0, 16]], ids=str)
def test_empty_steps_change_nothing(steps: list[int]) -> None:
    assert_same(*pair(steps))


@pytest.mark.parametrize("steps", [[WINDOW - 1], [WINDOW], [WINDOW + 1], [7] * 9, [1] * 50, [60, 1, 1], [3, 60, 4, 25]],
                         ids=str)  # fmt: skip
def test_update_hands_out_what_a_sliding_layer_of_transformers_does(steps: list[int]) -> None:
    paged, dynamic = PagedCache(config=tiny_config("sliding")), DynamicCache(config=tiny_config("sliding"))
    for step, num_tokens in enumerate(steps):
        for layer in range(2):
            new = states(2, num_tokens, seed=10 * step + layer)
            sizes = paged.get_mask_sizes(num_tokens, layer), dynamic.get_mask_sizes(num_tokens, layer)
            assert sizes[0] == sizes[1]
            for ours, theirs in zip(paged.update(*new, layer), dynamic.update(*new, layer), strict=True):
                assert torch.equal(ours.clone(), theirs)
    assert_same(paged, dynamic)


@pytest.mark.parametrize("removed", range(0, 34))
def test_crop_then_append_stores_the_same(removed: int) -> None:
    caches = pair([30, 1, 1, 1])
    for cache in caches:
        cache.crop(-removed)
    assert caches[0].get_seq_length() == 33 - removed
    if removed < 33:
        assert_same(*caches)
    for cache in caches:
        feed(cache, [19])
    assert_same(*caches)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 0, -1])),
        lambda cache: cache.batch_select_indices(torch.tensor([False, True])),
    ],
    ids=["swap", "one beam wins", "repeat", "one row", "rows again", "boolean mask"],
)
@pytest.mark.parametrize("length", [5, 16, 21])
@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.smoke
def test_rows_that_change_places_keep_their_tokens(kind: str, length: int, change) -> None:
    caches = pair([length], kind)
    for cache in caches:
        change(cache)
    batch = caches[1].layers[0].keys.shape[0]
    assert_same(*caches)
    for cache in caches:
        feed(cache, [1, 18], batch)
    assert_same(*caches)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.crop(-3),
        lambda cache: cache.crop(0),
        lambda cache: cache.reset(),
    ],
    ids=["reorder", "repeat", "select", "crop", "crop nothing", "reset"],
)
@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
def test_an_empty_cache_takes_every_operation(has_config: bool, change) -> None:
    cache = PagedCache(config=tiny_config("full") if has_config else None)
    change(cache)
    assert cache.get_seq_length() == 0
    feed(cache, [5])
    assert cache.get_seq_length() == 5


def test_a_reset_cache_takes_another_batch_size() -> None:
    cache, _ = pair([30])
    cache.reset()
    feed(cache, [7], batch=5)
    dynamic = DynamicCache(config=tiny_config("full"))
    feed(dynamic, [7], batch=5)
    assert_same(cache, dynamic)


def test_iteration_and_indexing_give_tensors() -> None:
    paged, dynamic = pair([21])
    assert len(paged) == len(dynamic) == 2
    for ours, theirs in zip(paged, dynamic, strict=True):
        assert len(ours) == len(theirs)
        assert torch.equal(torch.cat([ours[0]]), theirs[0])
        assert torch.equal(torch.cat([ours[1]]), theirs[1])


def test_early_initialization_makes_pools_without_tokens() -> None:
    cache = PagedCache(config=tiny_config("mixed"))
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert all(layer.is_initialized for layer in cache.layers)
    assert (cache.get_seq_length(), cache.stats().used_blocks) == (0, 0)
    for layer in range(3):
        cache.update(*states(2, 5), layer)
    assert cache.get_seq_length() == 5


def test_offload_and_prefetch_lose_nothing() -> None:
    caches = pair([21])
    for layer in caches[0].layers:
        layer.offload()
        layer.prefetch()
    assert_same(*caches)
    feed(caches[0], [4])
    feed(caches[1], [4])
    assert_same(*caches)


def test_layers_without_tokens_have_no_keys() -> None:
    cache = PagedCache(config=tiny_config("full"))
    assert [(layer.keys, layer.values, layer.is_initialized) for layer in cache.layers] == [(None, None, False)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_states_keep_their_dtype(dtype: torch.dtype) -> None:
    cache = PagedCache()
    keys, values = (x.to(dtype) for x in states(1, 20))
    handles = cache.update(keys, values, 0)
    assert torch.equal(handles[0].clone(), keys)
    assert handles[1].dtype == dtype


def test_keys_and_values_may_differ_in_heads_and_size() -> None:
    cache = PagedCache()
    keys, values = states(2, 20, num_heads=3, dim=24)[0], states(2, 20, num_heads=3, dim=16)[1]
    got = cache.update(keys, values, 0)
    assert torch.equal(got[0].clone(), keys)
    assert torch.equal(got[1].clone(), values)


def test_states_may_be_views_of_anything() -> None:
    cache = PagedCache()
    wide, _ = states(2, 20, num_heads=2, dim=32)
    keys, values = wide[..., ::2], wide.transpose(1, 2).contiguous().transpose(1, 2)[..., :16]
    got = cache.update(keys, values, 0)
    assert torch.equal(got[0].clone(), keys)
    assert torch.equal(got[1].clone(), values)
