"""Keys with loud channels in guarded caches: after every operation a row is read with its own centre.

A centre that was lost, or another row's, would leave errors of the size of the shift or of steps that cover it: both
are far above the bound, which is a step or so of noise without the shift.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from hf_kvopt import ATTENTION_NAME, PagedCache, QuantizedPagedCache

HEADS, DIM, SHIFT = 2, 32, 50.0
BOUNDS = {"int8": 0.04, "fp8_e4m3": 0.3, "fp8_e5m2": 0.6, "int4": 0.75, "k8v4": 0.04}
in_guarded_formats = pytest.mark.parametrize("name", BOUNDS)


def loud_states(batch: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys with a shift that differs by row in sign and size, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return keys, values


class Both:
    """A guarded cache and an unquantized one, fed alike; each row has a shift of its own."""

    def __init__(self, name: str, shifts: list[float], **options: Any) -> None:
        self.bound = BOUNDS[name]
        self.guarded: PagedCache = QuantizedPagedCache(format=name, **options)
        self.plain = PagedCache(**options)
        self.shifts = torch.tensor(shifts)
        self.seed = 0

    def feed(self, tokens: int) -> None:
        self.seed += 1
        keys, values = loud_states(len(self.shifts), tokens, self.seed)
        keys[..., 7] += self.shifts[:, None, None]
        keys[..., 23] -= self.shifts[:, None, None]
        for cache in (self.guarded, self.plain):
            for layer in range(2):
                cache.update(keys, values, layer)

    def both(self, operation: Callable[[PagedCache], Any]) -> None:
        operation(self.guarded)
        operation(self.plain)

    def select(self, rows: list[int]) -> None:
        self.both(lambda cache: cache.batch_select_indices(torch.tensor(rows)))
        self.shifts = self.shifts[rows]

    def check(self) -> None:
        for layer in range(2):
            got, want = self.guarded.layers[layer].keys.clone(), self.plain.layers[layer].keys.clone()
            assert (got - want).abs().max() < self.bound
        self.guarded.check_integrity()


@in_guarded_formats
@pytest.mark.parametrize("steps", [[40], [1] * 40, [15, 1, 1], [16, 17], [3, 30, 1, 20]], ids=str)
def test_rows_are_stored_less_their_own_shift(name: str, steps: list[int]) -> None:
    both = Both(name, [SHIFT, -SHIFT, 0.0, 2 * SHIFT])
    for tokens in steps:
        both.feed(tokens)
        both.check()


@in_guarded_formats
def test_the_bound_would_see_a_lost_centre(name: str) -> None:
    both = Both(name, [SHIFT, -SHIFT])
    both.feed(20)
    centres = both.guarded.layers[0].pool.keys.centres
    centres.ids = [0] * len(centres.ids)
    with pytest.raises(AssertionError):
        both.check()


@in_guarded_formats
def test_the_bound_would_see_a_guard_that_is_off(name: str) -> None:
    both = Both(name, [SHIFT])
    both.guarded = QuantizedPagedCache(format=name, guard="off")
    both.feed(20)
    with pytest.raises(AssertionError):
        both.check()


@in_guarded_formats
@pytest.mark.parametrize("removed", [1, 5, 16, 20, 33])
def test_crop_and_regrow_keep_the_centre(name: str, removed: int) -> None:
    both = Both(name, [SHIFT, -SHIFT])
    both.feed(34)
    both.both(lambda cache: cache.crop(-removed))
    both.feed(20)
    both.check()


@in_guarded_formats
def test_rows_take_their_centres_along(name: str) -> None:
    both = Both(name, [SHIFT, -SHIFT, 0.0])
    both.feed(20)
    both.both(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))
    both.shifts = both.shifts[[2, 0, 0]]
    both.check()
    both.feed(1)
    both.both(lambda cache: cache.batch_repeat_interleave(2))
    both.shifts = both.shifts.repeat_interleave(2)
    both.feed(17)
    both.check()
    both.select([5, 0, 3])
    both.feed(3)
    both.check()


@in_guarded_formats
def test_copies_take_their_centres_along(name: str) -> None:
    both = Both(name, [SHIFT, -SHIFT])
    both.feed(20)
    original, both.guarded = both.guarded, copy.deepcopy(both.guarded)
    both.feed(20)
    both.check()
    original.free()
    both.feed(40)
    both.check()
    both.guarded = pickle.loads(pickle.dumps(both.guarded))
    both.feed(20)
    both.check()


@in_guarded_formats
def test_offload_and_prefetch_take_centres_along(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(name, [SHIFT, -SHIFT])
    both.feed(20)
    # As between a card and its host: what is moved lies in other memory.
    monkeypatch.setattr(Tensor, "to", lambda x, *_, **__: x.clone())
    for layer in both.guarded.layers:
        centres = layer.pool.keys.centres.vectors
        layer.offload()
        layer.prefetch()
        centres.zero_()
    monkeypatch.undo()
    both.check()
    both.feed(20)
    both.check()


@in_guarded_formats
def test_a_reset_cache_learns_anew(name: str) -> None:
    both = Both(name, [SHIFT, -SHIFT])
    for shifts in ([0.0], [-2 * SHIFT, SHIFT, 0.0], [SHIFT]):
        both.feed(20)
        both.check()
        both.both(lambda cache: cache.reset())
        both.shifts = torch.tensor(shifts)


@in_guarded_formats
def test_centres_that_no_block_has_are_thrown_out(name: str) -> None:
    both = Both(name, [SHIFT] * 8)
    for _ in range(40):
        both.both(lambda cache: cache.reset())
        both.feed(20)
        both.check()
    assert len(both.guarded.layers[0].pool.keys.centres.vectors) <= 100


@in_guarded_formats
def test_fixed_capacity_keeps_a_centre_a_row(name: str) -> None:
    options = {"max_tokens": 3 * 64, "compileable": True}
    both = Both(name, [SHIFT, -SHIFT, 0.0], **options)
    both.feed(20)
    both.feed(1)
    both.check()
    both.both(lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])))
    both.shifts = both.shifts[[1, 1, 0]]
    both.feed(1)
    both.check()
    original, both.guarded = both.guarded, copy.deepcopy(both.guarded)
    both.feed(2)
    both.check()
    both.guarded = original
    both.both(lambda cache: cache.reset())
    both.plain = PagedCache(**options)
    both.shifts = torch.tensor([0.0, SHIFT, -SHIFT])
    both.feed(18)
    both.check()


@in_guarded_formats
def test_a_row_is_guarded_alike_alone_and_beside_a_louder_one(name: str) -> None:
    keys, values = loud_states(2, 40, seed=3)
    keys[..., 7] += SHIFT
    keys[1] *= 100
    together, alone = QuantizedPagedCache(format=name), QuantizedPagedCache(format=name)
    for now in (slice(0, 20), slice(20, 21), slice(21, 40)):
        together.update(keys[:, :, now], values[:, :, now], 0)
        alone.update(keys[:1, :, now], values[:1, :, now], 0)
    assert torch.equal(together.layers[0].keys[:1], alone.layers[0].keys.clone())


class Attention(torch.nn.Module):
    """What a model's attention module says of itself."""

    layer_idx, num_key_value_groups, is_causal = 0, 2, True


@in_guarded_formats
@pytest.mark.parametrize("steps", [[20], [20, 1], [20, 1, 5, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"s_aux": torch.randn(4)}], ids=["plain", "capped", "sinks"])
def test_attention_over_guarded_codes_is_attention_over_what_they_stand_for(
    name: str, steps: list[int], options: dict[str, Any]
) -> None:
    attend = AttentionInterface()[ATTENTION_NAME]
    cache = QuantizedPagedCache(format=name)
    module = Attention().eval()
    with torch.inference_mode():
        for seed, tokens in enumerate(steps):
            keys, values = loud_states(2, tokens, seed)
            keys[..., 7] += torch.tensor([SHIFT, -SHIFT])[:, None, None]
            query = torch.randn(2, 4, tokens, DIM, generator=torch.Generator().manual_seed(seed))
            read = cache.update(keys, values, 0)
            got, _ = attend(module, query, *read, None, scaling=0.2, **options)
            want, _ = attend(module, query, *(x.clone() for x in read), None, scaling=0.2, **options)
            assert cache.layers[0].pool.keys.centre_of(cache.layers[0].table) is not None
            # Scores of 10 times the shift lie behind the dense side.
            assert (got - want).abs().max() < 2e-3
