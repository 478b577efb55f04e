"""Every operation on a cache, in every format: what is read is what each token alone was quantized to.

Guards of the keys are off here, and tested by test_guard.py.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from hf_kvopt import PagedCache, QuantizedPagedCache
from hf_kvopt.quant import KVFormat, dequantize, get_kv_format, quantize
from tests.helpers import WINDOW, states, tiny_config

BLOCK = 16
# Those that store each token by itself; test_sealed.py has the others.
FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2", "int4/int4", "int8/int4"]
in_every_format = pytest.mark.parametrize("name", [*FORMATS, "fp8_e4m3/int4", "native/int8"])


def as_stored(x: Tensor, fmt: KVFormat, which: str) -> Tensor:
    """What a cache must give back for states `x`."""
    one = getattr(fmt, which)
    return dequantize(*quantize(x, one), one, x.dtype)


def expected(keys: Tensor, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values as a format stores them."""
    fmt = get_kv_format(name)
    return as_stored(keys, fmt, "k"), as_stored(values, fmt, "v")


def fed(name: str, steps: list[int], batch: int = 2, **options: object) -> tuple[PagedCache, Tensor, Tensor]:
    """A cache of two layers fed in steps, and the keys and values that its first layer should read."""
    cache = QuantizedPagedCache(guard="off", format=name, **options)
    total = sum(steps)
    keys, values = states(batch, total)
    done = 0
    for step in steps:
        now = slice(done, done + step)
        for layer in range(2):
            sign = 1 - 2 * layer
            cache.update(sign * keys[:, :, now], sign * values[:, :, now], layer)
        done += step
    return cache, *expected(keys, values, name)


def assert_reads(cache: PagedCache, keys: Tensor, values: Tensor) -> None:
    assert torch.equal(cache.layers[0].keys.clone(), keys)
    assert torch.equal(cache.layers[0].values.clone(), values)
    cache.check_integrity()


@in_every_format
@pytest.mark.parametrize("length", range(1, 2 * BLOCK + 2))
def test_a_prompt_of_any_length_reads_back_as_stored_alone(name: str, length: int) -> None:
    assert_reads(*fed(name, [length]))
    assert_reads(*fed(name, [length, 1, 1]))


@in_every_format
def test_chunks_and_single_tokens_store_the_same(name: str) -> None:
    for steps in ([40], [1] * 40, [3, 17, 16, 4], [39, 1]):
        assert_reads(*fed(name, steps))


@in_every_format
def test_update_hands_out_what_is_stored(name: str) -> None:
    cache = QuantizedPagedCache(guard="off", format=name)
    keys, values = states(2, 21)
    for got, want in zip(cache.update(keys, values, 0), expected(keys, values, name), strict=True):
        assert torch.equal(got.clone(), want)


@in_every_format
def test_exact_prefill_hands_out_the_first_prompt_as_it_came(name: str) -> None:
    cache = QuantizedPagedCache(guard="off", format=name, exact_prefill=True)
    keys, values = states(2, 21)
    got = cache.update(keys, values, 0)
    assert torch.equal(got[0].clone(), keys)
    assert torch.equal(got[1].clone(), values)
    stored = expected(keys, values, name)
    more = states(2, 1, seed=1)
    got = cache.update(*more, 0)
    for x, was, new in zip(got, stored, expected(*more, name), strict=True):
        assert torch.equal(x.clone(), torch.cat([was, new], dim=2))


@in_every_format
@pytest.mark.parametrize("removed", [1, 2, 15, 16, 17, 33])
def test_crop_then_append_reads_as_if_never_written(name: str, removed: int) -> None:
    cache, keys, values = fed(name, [30, 4])
    cache.crop(-removed)
    more = states(2, 5, seed=3)
    for layer in range(2):
        cache.update(*more, layer)
    new = expected(*more, name)
    kept = 34 - removed
    assert_reads(cache, torch.cat([keys[:, :, :kept], new[0]], dim=2), torch.cat([values[:, :, :kept], new[1]], dim=2))


@in_every_format
def test_batch_operations_carry_codes_and_scales(name: str) -> None:
    cache, keys, values = fed(name, [21], batch=3)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    keys, values = keys[[2, 0, 0]], values[[2, 0, 0]]
    assert_reads(cache, keys, values)
    cache.batch_repeat_interleave(2)
    keys, values = keys.repeat_interleave(2, dim=0), values.repeat_interleave(2, dim=0)
    assert_reads(cache, keys, values)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    keys, values = keys[[5, 0, 3]], values[[5, 0, 3]]
    assert_reads(cache, keys, values)
    more = states(3, 20, seed=5)
    for layer in range(2):
        cache.update(*more, layer)
    new = expected(*more, name)
    assert_reads(cache, torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2))


@in_every_format
def test_a_fork_and_its_original_write_apart(name: str) -> None:
    cache, keys, values = fed(name, [21])
    twin = copy.deepcopy(cache)
    news = [states(2, 3, seed=7), states(2, 3, seed=8)]
    for each, new in zip((cache, twin), news, strict=True):
        for layer in range(2):
            each.update(*new, layer)
    for each, new in zip((cache, twin), news, strict=True):
        new_keys, new_values = expected(*new, name)
        assert_reads(each, torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2))


@in_every_format
def test_a_pickled_cache_reads_the_same(name: str) -> None:
    cache, keys, values = fed(name, [21])
    read = pickle.loads(pickle.dumps(cache))
    assert_reads(read, keys, values)
    more = states(2, 3, seed=7)
    for layer in range(2):
        read.update(*more, layer)
    new_keys, new_values = expected(*more, name)
    assert_reads(read, torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    assert_reads(torch.load(buffer, weights_only=False), keys, values)


@in_every_format
def test_offload_and_prefetch_carry_codes_and_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, keys, values = fed(name, [21])
    # As between a card and its host: what is moved lies in other memory.
    monkeypatch.setattr(Tensor, "to", lambda x, *_, **__: x.clone())
    for layer in cache.layers:
        before = [x for plane in layer.pool.planes for x in plane.tensors]
        layer.offload()
        layer.prefetch()
        for old in before:
            old.zero_()
    monkeypatch.undo()
    assert_reads(cache, keys, values)
    more = states(2, 20, seed=7)
    for layer in range(2):
        cache.update(*more, layer)
    new = expected(*more, name)
    assert_reads(cache, torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2))


@in_every_format
def test_rows_cut_to_unlike_lengths_go_on_as_if_never_longer(name: str) -> None:
    cache, keys, values = fed(name, [30, 4])
    cache.crop_rows([20, 33])
    more = states(2, 5, seed=3)
    for layer in range(2):
        cache.update(*more, layer)
    new = expected(*more, name)
    for which, was, then in zip(("keys", "values"), (keys, values), new, strict=True):
        read = getattr(cache.layers[0], which).clone()
        for row, length in ((0, 20), (1, 33)):
            wanted = torch.cat([was[row, :, :length], then[row]], dim=1)
            assert torch.equal(read[row, :, -length - 5 :], wanted)
    cache.check_integrity()


@in_every_format
def test_an_accepted_path_moves_codes_and_scales(name: str) -> None:
    cache, keys, values = fed(name, [14, 6])
    cache.keep_paths(6, [[0, 3, 5], [1, 2, 4]])
    rows = torch.tensor([[*range(14), 14, 17, 19], [*range(14), 15, 16, 18]])[:, None, :, None]
    for which, was in (("keys", keys), ("values", values)):
        assert torch.equal(getattr(cache.layers[0], which).clone(), was.gather(2, rows.expand(-1, 2, -1, 8)))
    cache.check_integrity()


@in_every_format
def test_reset_forgets_the_tokens_and_stores_anew(name: str) -> None:
    cache, *_ = fed(name, [21])
    cache.reset()
    keys, values = states(3, 5, seed=2)
    for layer in range(2):
        cache.update(keys, values, layer)
    assert_reads(cache, *expected(keys, values, name))


@in_every_format
def test_a_row_is_stored_alike_alone_and_beside_one_a_hundred_times_larger(name: str) -> None:
    keys, values = states(2, 37)
    factor = torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    together, alone = QuantizedPagedCache(guard="off", format=name), QuantizedPagedCache(guard="off", format=name)
    for now in (slice(0, 30), slice(30, 31), slice(31, 37)):
        together.update((keys * factor)[:, :, now], (values * factor)[:, :, now], 0)
        alone.update(keys[:1, :, now], values[:1, :, now], 0)
    for which in ("keys", "values"):
        assert torch.equal(getattr(together.layers[0], which)[:1], getattr(alone.layers[0], which).clone())


@in_every_format
@pytest.mark.parametrize("steps", [[WINDOW], [7] * 9, [1] * 50, [60, 1, 1], [3, 60, 4, 25]], ids=str)
def test_sliding_layers_hand_out_stored_tokens_only(name: str, steps: list[int]) -> None:
    cache = QuantizedPagedCache(tiny_config("sliding"), guard="off", format=name, skip_layers=())
    plain = PagedCache(tiny_config("sliding"))
    for step, num_tokens in enumerate(steps):
        for layer in range(2):
            new = states(2, num_tokens, seed=10 * step + layer)
            got = cache.update(*new, layer)
            for x, want in zip(got, plain.update(*expected(*new, name), layer), strict=True):
                assert torch.equal(x.clone(), want.clone())
    cache.check_integrity()


def test_sliding_layers_stay_as_they_came_by_default() -> None:
    cache = QuantizedPagedCache(tiny_config("mixed"), guard="off")
    keys, values = states(1, 5)
    for layer in range(3):
        cache.update(keys, values, layer)
    assert torch.equal(cache.layers[0].keys.clone(), keys)
    assert torch.equal(cache.layers[1].keys.clone(), expected(keys, values, "int8")[0])
