"""copy.deepcopy is a copy-on-write fork, pickling a real copy: either goes its own way from there."""

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, PagedCache
from tests.helpers import KINDS, eager_continuation, generate, prompt, states, tiny_model, unpadded


def _through_torch_save(cache: PagedCache) -> PagedCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[PagedCache], PagedCache]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": _through_torch_save,
}
TEXT = prompt(37)["input_ids"]


def prefilled(kind: str, has_config: bool = True) -> PagedCache:
    """Fill a cache with all of TEXT."""
    model = tiny_model(kind)
    cache = PagedCache(config=model.config) if has_config else PagedCache()
    with torch.no_grad():
        model(TEXT, **{CACHE_KEYWORD: cache})
    return cache


def longer(seed: int) -> torch.Tensor:
    return torch.cat([TEXT, prompt(6, seed=seed)["input_ids"]], dim=1)


@pytest.mark.smoke
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copy_and_original_diverge_and_both_are_right(kind: str, way: str) -> None:
    model, cache = tiny_model(kind), prefilled(kind)
    twin = COPIES[way](cache)
    for turn, each in enumerate((twin, cache)):
        tokens = generate(model, unpadded(longer(seed=turn)), each)
        assert torch.equal(tokens, eager_continuation(kind, longer(seed=turn)))
    cache.check_integrity()
    twin.check_integrity()


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_cache_without_config_still_grows_layers(way: str) -> None:
    twin = COPIES[way](PagedCache(max_tokens=64, block_size=32))
    assert torch.equal(generate(tiny_model(), unpadded(TEXT), twin), eager_continuation("full", TEXT))
    assert len(twin.layers) == 2
    assert twin.cache_config.block_size == 32


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_outlives_its_original(way: str) -> None:
    cache = prefilled("full", has_config=False)
    twin = COPIES[way](cache)
    cache.free()
    del cache
    gc.collect()
    assert torch.equal(generate(tiny_model(), unpadded(longer(1)), twin), eager_continuation("full", longer(1)))
    twin.check_integrity()


@pytest.mark.smoke
def test_a_fork_shares_every_block_until_it_writes() -> None:
    cache = prefilled("full")
    alone = cache.stats()
    forks = [copy.deepcopy(cache) for _ in range(5)]
    stats = cache.stats()
    assert (stats.used_blocks, stats.used_bytes) == (alone.used_blocks, alone.used_bytes)
    assert stats.shared_blocks == stats.used_blocks == 3
    generate(tiny_model(), unpadded(longer(2)), forks[0], max_new_tokens=2)
    assert cache.stats().used_blocks == alone.used_blocks + 1
    assert cache.stats().shared_blocks == 3
    cache.check_integrity()


@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
def test_a_dropped_fork_gives_its_blocks_back_at_once(has_config: bool) -> None:
    cache = prefilled("full", has_config)
    used = cache.stats().used_blocks
    gc.disable()
    try:
        fork = copy.deepcopy(cache)
        generate(tiny_model(), unpadded(longer(2)), fork, max_new_tokens=40)
        assert cache.stats().used_blocks > used
        del fork
        assert cache.stats().used_blocks == used
    finally:
        gc.enable()
    cache.check_integrity()


def test_a_fork_of_a_fork_reads_right_after_both_parents_are_freed() -> None:
    cache = prefilled("mixed")
    middle = copy.deepcopy(cache)
    last = copy.deepcopy(middle)
    generate(tiny_model("mixed"), unpadded(longer(1)), middle)
    cache.free()
    middle.free()
    assert torch.equal(generate(tiny_model("mixed"), unpadded(longer(2)), last), eager_continuation("mixed", longer(2)))
    last.check_integrity()


def test_a_fork_of_a_full_cache_at_its_cap_still_reads() -> None:
    cache = prefilled("full")
    cap = PagedCache(max_tokens=48)
    with torch.no_grad():
        tiny_model()(TEXT, **{CACHE_KEYWORD: cap})
    fork = copy.deepcopy(cap)
    for ours, theirs in zip(fork.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys.clone(), theirs.keys.clone())


def test_pickling_a_cache_leaves_it_untouched_and_without_its_forks() -> None:
    cache = prefilled("full")
    fork = copy.deepcopy(cache)
    restored = pickle.loads(pickle.dumps(cache))
    gc.collect()
    assert restored.stats().shared_blocks == 0
    restored.check_integrity()
    assert cache.stats().shared_blocks == 3
    assert fork.get_seq_length() == restored.get_seq_length() == 37


def test_a_layer_that_holds_more_than_the_others_does_not_keep_rows_from_parting() -> None:
    # Cross attention to an image is written once, and reaches beyond the prompt.
    cache = PagedCache()
    for layer, length in ((0, 5), (1, 20)):
        cache.update(*states(1, length), layer)
    cache.batch_repeat_interleave(2)
    twin = copy.deepcopy(cache)
    keys, values = states(2, 1, seed=1)
    cache.update(keys, values, 0)
    assert torch.equal(cache.layers[0].keys[:, :, 5:], keys)
    assert torch.equal(cache.layers[0].values[:, :, 5:], values)
    other = states(2, 30, seed=2)
    twin.update(*other, 0)
    assert torch.equal(twin.layers[0].keys[:, :, 5:], other[0])
    for each in (cache, twin):
        assert torch.equal(each.layers[0].keys[:, :, :5], states(1, 5)[0].expand(2, -1, -1, -1))
        assert torch.equal(each.layers[1].keys.clone(), states(1, 20)[0].expand(2, -1, -1, -1))
        each.check_integrity()
    assert torch.equal(cache.layers[0].keys[:, :, 5:], keys)
