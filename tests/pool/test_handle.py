"""What a handle gives to code that takes it for a tensor, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from hf_kvopt import PagedCache, QuantizedPagedCache
from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.handle import KVHandle, view_of
from tests.helpers import states


def filled(num_tokens: int = 21, batch: int = 2) -> tuple[PagedCache, KVHandle, Tensor]:
    """Fill a cache of one layer; hand back the handle on its keys and what it should read."""
    cache = PagedCache()
    keys, values = states(batch, num_tokens)
    handle, _ = cache.update(keys, values, 0)
    assert isinstance(handle, KVHandle)
    return cache, handle, keys


@pytest.mark.smoke
def test_a_handle_looks_like_the_tensor_it_stands_for() -> None:
    _, handle, keys = filled()
    assert (handle.shape, handle.dtype, handle.device) == (keys.shape, keys.dtype, keys.device)
    assert handle.size(2) == 21
    assert torch.equal(handle.dense(), keys)


def test_dense_is_contiguous_where_rows_lie_apart_and_where_they_do_not() -> None:
    cache, handle, _ = filled()
    assert handle.dense().is_contiguous()
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    shuffled = cache.layers[0].keys
    assert isinstance(shuffled, KVHandle)
    assert shuffled.dense().is_contiguous()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: torch.cat([x, x], dim=2),
        lambda x: torch.stack([x, x]),
        lambda x: x[:, :, -5:],
        lambda x: x.transpose(2, 3) @ x,
        lambda x: x.repeat_interleave(2, dim=1),
        lambda x: x.to(torch.float64),
        lambda x: x.index_select(0, torch.tensor([1, 0])),
        lambda x: x.float().mean(-1),
        lambda x: x.clone(),
    ],
    ids=["add", "cat", "stack", "slice", "matmul", "repeat", "cast", "select", "mean", "clone"],
)
def test_any_other_operation_gets_a_gathered_copy(operation) -> None:
    _, handle, keys = filled()
    assert torch.equal(operation(handle), operation(keys))


def test_a_handle_can_be_the_second_of_two_tensors() -> None:
    _, handle, keys = filled()
    new = torch.ones(2, 2, 1, 8)
    assert torch.equal(torch.cat([new, handle], dim=2), torch.cat([new, keys], dim=2))


@pytest.mark.parametrize(
    "mutate",
    [
        lambda x: x.add_(1),
        lambda x: x.zero_(),
        lambda x: x.copy_(torch.zeros(x.shape)),
        lambda x: x.__setitem__((0, 0, 0, 0), 1.0),
        lambda x: torch.add(torch.zeros(x.shape), 1, out=x),
    ],
    ids=["add in place", "zero", "copy into", "item", "out argument"],
)
def test_writing_into_a_handle_raises_and_loses_nothing(mutate) -> None:
    cache, handle, keys = filled()
    with pytest.raises((CacheStateError, RuntimeError)):
        mutate(handle)
    stored = cache.layers[0].keys
    assert torch.equal(stored.clone(), keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.update(*states(2, 1), 0),
        lambda cache: cache.crop(-1),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
        lambda cache: cache.free(),
    ],
    ids=["update", "crop", "reorder", "reset", "free"],
)
def test_a_handle_is_out_of_date_once_its_cache_has_moved_on(change) -> None:
    cache, handle, _ = filled()
    change(cache)
    with pytest.raises(CacheStateError, match=r"out of date.*cache\.layers\[i\]\.keys"):
        handle + 1


def test_a_clone_outlives_the_next_step() -> None:
    cache, handle, keys = filled()
    copied = handle.clone()
    cache.update(*states(2, 9, seed=1), 0)
    assert torch.equal(copied, keys)
    assert not isinstance(copied, KVHandle)


def test_detach_and_alias_stay_handles_on_the_same_blocks() -> None:
    _, handle, keys = filled()
    for other in (handle.detach(), handle.data, torch.ops.aten.alias(handle)):
        assert isinstance(other, KVHandle)
        assert other.codes.data_ptr() == handle.codes.data_ptr()
        assert torch.equal(other.dense(), keys)


def test_gathers_are_counted_and_reads_in_place_are_not() -> None:
    cache, handle, _ = filled()
    view_of(handle).dense()
    assert cache.stats().dense_fallbacks == 0
    for number in (1, 2, 3):
        handle + 1
        assert cache.stats().dense_fallbacks == number


def test_rows_side_by_side_are_read_as_a_view() -> None:
    _, handle, _ = filled()
    assert view_of(handle).dense().untyped_storage().data_ptr() == handle.codes.untyped_storage().data_ptr()


def test_one_warning_names_the_operation_that_gathered(caplog: pytest.LogCaptureFixture) -> None:
    _, handle, _ = filled()
    for _ in range(3):
        torch.ops.aten.cosh(handle)
    said = [record.message for record in caplog.records if "aten.cosh" in record.message]
    assert len(said) == 1
    assert "gathered from the paged cache" in said[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copied_handle_holds_the_same_numbers(duplicate) -> None:
    _, handle, keys = filled()
    assert torch.equal(torch.as_tensor(duplicate(handle)).clone(), keys)


@pytest.mark.parametrize("name", ["native", "int8", "int4"])
def test_what_is_offloaded_behind_a_handle_is_still_read(name: str) -> None:
    cache = PagedCache() if name == "native" else QuantizedPagedCache(format=name)
    keys, values = states(2, 20)
    cache.update(keys, values, 0)
    handles = cache.update(*states(2, 1, seed=1), 0)
    want = [handle.clone() for handle in handles]
    # As transformers offloads a layer as soon as it has handed out its keys and values.
    for plane in cache.layers[0].pool.planes:
        plane.to(torch.device("meta"))
    assert all(torch.equal(handle.clone(), copy) for handle, copy in zip(handles, want, strict=True))
