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
from transformers import AttentionInterface, LlamaConfig

from hf_kvopt import ATTENTION_NAME, PagedCache, QuantizedPagedCache

HEADS, DIM, SHIFT = 2, 32, 50.0
BOUNDS = {"int8": 0.04, "fp8_e4m3": 0.3, "fp8_e5m2": 0.6, "int4/int4": 0.75, "int8/int4": 0.04}
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


def sink_states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys whose first token is loud where no other is, and the other way round."""
    keys, values = loud_states(2, tokens, seed)
    keys[..., 5] += SHIFT
    keys[:, :, 0, 5] -= SHIFT
    keys[:, :, 0, 9] = SHIFT
    keys[1] *= -1
    return keys, values


CUTS = [[1, 39], [1] * 40, [1, 3, 30, 6], [15, 1, 24], [15, 25], [40]]


@in_guarded_formats
@pytest.mark.parametrize("steps", CUTS[:-1], ids=lambda steps: "-".join(map(str, steps[:6])))
def test_a_text_is_stored_alike_however_it_is_cut(name: str, steps: list[int]) -> None:
    keys, values = sink_states(40)
    caches = []
    for cut in (steps, [40]):
        caches.append(QuantizedPagedCache(format=name))
        for k, v in zip(keys.split(cut, dim=2), values.split(cut, dim=2), strict=True):
            caches[-1].update(k, v, 0)
    for which in ("keys", "values"):
        assert torch.equal(*(getattr(cache.layers[0], which).clone() for cache in caches))
    assert (caches[0].layers[0].keys.clone() - keys).abs().max() < SHIFT / 4
    assert not caches[0].layers[0].pool.keys.centres.early


@in_guarded_formats
def test_rows_that_began_short_learn_after_every_operation(name: str) -> None:
    whole_keys, whole_values = sink_states(40)
    want = QuantizedPagedCache(format=name)
    want.update(whole_keys, whole_values, 0)
    stored = want.layers[0].keys.clone()

    def feed(cache: PagedCache, rows: list[int], start: int, stop: int) -> None:
        cache.update(whole_keys[rows, :, start:stop], whole_values[rows, :, start:stop], 0)

    cache = QuantizedPagedCache(format=name)
    feed(cache, [0, 1], 0, 1)
    feed(cache, [0, 1], 1, 9)
    cache.crop(-4)
    feed(cache, [0, 1], 5, 6)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(2)
    feed(cache, [1] * 4, 6, 8)
    twin = copy.deepcopy(cache)
    feed(twin, [1] * 4, 8, 40)
    assert torch.equal(twin.layers[0].keys.clone(), stored[[1] * 4])
    cache = pickle.loads(pickle.dumps(cache))
    cache.batch_select_indices(torch.tensor([2]))
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    # A draft of five, of which the second, third and fifth are taken.
    draft = torch.tensor([0, 8, 9, 0, 10])
    cache.update(whole_keys[1:, :, draft], whole_values[1:, :, draft], 0)
    cache.keep_paths(5, [[1, 2, 4]])
    feed(cache, [1], 11, 40)
    assert torch.equal(cache.layers[0].keys.clone(), stored[1:])
    cache.check_integrity()
    cache.reset()
    feed(cache, [0], 0, 40)
    assert torch.equal(cache.layers[0].keys.clone(), stored[:1])


@in_guarded_formats
@pytest.mark.parametrize("steps", CUTS, ids=lambda steps: "-".join(map(str, steps[:6])))
def test_fixed_capacity_stores_what_a_growing_cache_stores(name: str, steps: list[int]) -> None:
    keys, values = sink_states(40)
    growing = QuantizedPagedCache(format=name)
    growing.update(keys, values, 0)
    fixed = QuantizedPagedCache(format=name, max_tokens=128, compileable=True)
    for _ in range(2):
        for k, v in zip(keys.split(steps, dim=2), values.split(steps, dim=2), strict=True):
            fixed.update(k, v, 0)
            fixed.reorder_cache(torch.tensor([0, 1]))
        assert torch.equal(fixed.layers[0].keys.clone(), growing.layers[0].keys.clone())
        fixed.reset()
        # Rows of an earlier text, and figures asked for in between, leave nothing behind.
        fixed.update(keys[:, :, 1:4], values[:, :, 1:4], 0)
        fixed.reset()
        assert fixed.stats().num_tokens == 0


@in_guarded_formats
@pytest.mark.parametrize("steps", [*CUTS, [5, 12, 23], [3, 9, 9, 19]], ids=lambda steps: "-".join(map(str, steps[:6])))
@pytest.mark.parametrize("window", [8, 20])
def test_a_window_that_slides_at_once_keeps_the_shift_of_the_first_tokens(
    window: int, steps: list[int], name: str
) -> None:
    config = LlamaConfig(num_hidden_layers=1)
    config.sliding_window, config.layer_types = window, ["sliding_attention"]
    keys, values = sink_states(40)
    sliding = QuantizedPagedCache(config, format=name, skip_layers=())
    whole = QuantizedPagedCache(format=name)
    assert sliding.layers[0].is_sliding
    whole.update(keys, values, 0)
    for k, v in zip(keys.split(steps, dim=2), values.split(steps, dim=2), strict=True):
        sliding.update(k, v, 0)
    held = sliding.layers[0].keys.clone()
    assert torch.equal(held, whole.layers[0].keys[:, :, -held.shape[2] :])
    assert not sliding.layers[0].pool.keys.centres.early


@in_guarded_formats
def test_padding_teaches_a_row_nothing(name: str) -> None:
    keys, values = sink_states(40)
    padded_keys, padded_values = (
        torch.cat([x[:, :, :1].repeat(1, 1, 24, 1), x[:, :, 1:]], dim=2) for x in (keys, values)
    )
    alone, padded = QuantizedPagedCache(format=name), QuantizedPagedCache(format=name)
    alone.update(keys[:, :, 1:], values[:, :, 1:], 0)
    padded.update(padded_keys, padded_values, 0)
    assert torch.equal(padded.layers[0].keys[:, :, 24:], alone.layers[0].keys.clone())
    one_row = QuantizedPagedCache(format=name)
    one_row.update(padded_keys[:1], padded_values[:1], 0)
    assert torch.equal(padded.layers[0].keys[:1], one_row.layers[0].keys.clone())
    # And what is all padding so far is stored as any other text is.
    whole = QuantizedPagedCache(format=name)
    whole.update(padded_keys[:, :, :20], padded_values[:, :, :20], 0)
    assert (whole.layers[0].keys.clone() - padded_keys[:, :, :20]).abs().max() < 2 * BOUNDS[name]


@in_guarded_formats
def test_rows_of_fixed_capacity_that_began_short_change_places(name: str) -> None:
    keys, values = sink_states(40)
    growing, fixed = (
        QuantizedPagedCache(format=name),
        QuantizedPagedCache(format=name, max_tokens=128, compileable=True),
    )
    growing.update(keys[[1, 0]], values[[1, 0]], 0)
    fixed.update(keys[:, :, :2], values[:, :, :2], 0)
    fixed.reorder_cache(torch.tensor([1, 0]))
    fixed.update(keys[[1, 0], :, 2:], values[[1, 0], :, 2:], 0)
    assert torch.equal(fixed.layers[0].keys.clone(), growing.layers[0].keys.clone())


def test_a_compiled_prefill_learns_its_centre() -> None:
    torch._dynamo.reset()
    config = LlamaConfig(num_hidden_layers=1)
    eager, traced = (
        QuantizedPagedCache(config, format="int4/int4", max_tokens=128, compileable=True) for _ in range(2)
    )  # fmt: skip
    compiled = torch.compile(lambda k, v: traced.update(k, v, 0)[0].clone(), backend="eager")
    for sign in (1, -1):
        keys, values = (sign * x for x in sink_states(44))
        # A short text before, whose keys wait for more.
        traced.update(keys[:, :, 1:4], values[:, :, 1:4], 0)
        traced.reset()
        for now in (slice(0, 20), slice(20, 40)):
            eager.update(keys[:, :, now], values[:, :, now], 0)
            read = compiled(keys[:, :, now], values[:, :, now])
        assert traced.layers[0].centres.vectors.abs().max() > SHIFT / 2
        for cache in (eager, traced):
            cache.update(keys[:, :, 40:], values[:, :, 40:], 0)
        assert torch.equal(traced.layers[0].keys.clone(), eager.layers[0].keys.clone())
        assert torch.equal(read[:, :, :40], eager.layers[0].keys[:, :, :40])
        eager.reset()
        traced.reset()
    torch._dynamo.reset()


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
