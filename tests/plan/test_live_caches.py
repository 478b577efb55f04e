"""Predicted bytes equal those of live caches, for every architecture that the suite can build."""

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import hf_kvopt
from hf_kvopt.errors import KVOptError, UnsupportedModel
from hf_kvopt.plan.blocks import count_blocks
from hf_kvopt.plan.memory import memory
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from tests.helpers import KINDS, prompt, tiny_model
from tests.models import expected
from tests.models.cases import Case, covered_cases
from tests.models.inputs import inputs_for
from tests.models.reference import generate
from tests.models.routes import _spy_on_cache
from tests.models.tiny import NEW_TOKENS, build

BLOCK_SIZE = 16
ALL = pytest.mark.parametrize("case", covered_cases(), ids=lambda case: case.name)
# The model makes its own kind of cache in `generate`, whatever `enable` set.
MAKES_ITS_OWN = {"musicgen_melody"}
# No cache, and no field about one in the config: only the class tells.
WITHOUT_CACHE = set(expected.REFUSED)


def longest(cache: hf_kvopt.PagedCache) -> int:
    """Return the tokens of the longest row, image prompts and special tokens included."""
    return max((table.clock for table in cache._tables.values()), default=0)


@ALL
def test_predicted_bytes_equal_those_of_the_live_cache(case: Case) -> None:
    model = build(case)
    if case.name in WITHOUT_CACHE:
        with pytest.raises(UnsupportedModel, match="cache of its own"):
            memory(model, context=8, weights=False)
        return
    hf_kvopt.enable(model, cache="paged", attention=False, block_size=BLOCK_SIZE)
    made = _spy_on_cache(model)
    generate(model, inputs_for(case, model))
    if case.name in MAKES_ITS_OWN:
        assert not made
        return
    cache = made[0]
    own, cross = cache, None
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
    length = longest(own)
    got = memory(
        model,
        context=max(1, length),
        # One forward for the prompt, one for each new token but the last.
        prompt=max(1, length - NEW_TOKENS + 1),
        batch=max(1, own.num_rows),
        encoder_context=None if cross is None else longest(cross),
        block_size=BLOCK_SIZE,
        dtype="float32",
        weights=False,
    )
    live = own.stats()
    assert (got.used_bytes, got.reserved_bytes) == (live.used_bytes, live.reserved_bytes)
    if cross is not None:
        live = cross.stats()
        assert (got.cross_used_bytes, got.cross_reserved_bytes) == (live.used_bytes, live.reserved_bytes)
    planes = [plane for layer in own.layers if getattr(layer, "pool", None) for plane in layer.pool.planes]
    said = [shape for layer in got.layers if layer.format != "-" for shape in (layer.key_shape, layer.value_shape)]
    if not any(layer.kind.startswith("kept by") for layer in got.layers):
        assert said == [(plane.num_heads, plane.dim) for plane in planes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [7, 19, 20, 21, 90])
def test_dynamic_bytes_are_those_of_transformers_own_cache(kind: str, length: int) -> None:
    model = tiny_model(kind, "eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt(length, length), **{hf_kvopt.CACHE_KEYWORD: cache})
    live = sum(x.nbytes for layer in cache.layers for x in (layer.keys.contiguous(), layer.values.contiguous()))
    got = memory(model, context=length, batch=2, cache="dynamic", dtype="float32", weights=False)
    assert got.used_bytes == live


@pytest.mark.parametrize("seed", range(60))
def test_block_counts_follow_the_table_and_the_allocator(seed: int) -> None:
    draw = random.Random(seed)
    batch, size = draw.choice([1, 2, 3, 8]), draw.choice([16, 32])
    window = draw.choice([None, None, 5, 20, 64])
    first, length = sorted(draw.sample(range(1, 900), 2))
    cap = draw.choice([None, batch * -(-length // size) + draw.randrange(3)])
    table = BlockTable(BlockAllocator(max_blocks=cap), size, window)
    table.reserve(batch, first)
    for clock in range(first + 1, length + 1):
        table.reserve(batch, clock)
    live = table.allocator
    want = (live.num_blocks - live.num_free, live.num_blocks)
    assert count_blocks(batch, length, first, window, size, cap) == want


@pytest.mark.parametrize("window", [5, 16, 20, 64])
def test_without_a_prompt_sliding_rows_count_the_most_that_they_ever_hold(window: int) -> None:
    length = 300
    ways = [count_blocks(1, length, first, window, 16).used for first in range(1, length + 1)]
    most = max(count_blocks(1, n, first, window, 16).used for first in (1, 40, 77) for n in range(first, length))
    assert max(ways) <= count_blocks(1, length, None, window, 16).used == most


# One model of each geometry: latents, full heads, sliding beside full, shared layers, states, an encoder.
_GEOMETRIES = ["llama", "deepseek_v3", "gemma3_text", "gemma4_text", "jamba", "mistral", "T5ForConditionalGeneration"]


@pytest.mark.parametrize("name", _GEOMETRIES)
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int8"},
        {"format": "k8v4", "skip_layers": ()},
        {"format": "int4", "skip_layers": ("first", "sliding")},
        {"format": "fp8_e5m2/int4", "layer_formats": {-1: "native"}},
    ],
    ids=str,
)
def test_quantized_bytes_equal_those_of_the_live_cache(name: str, options: dict[str, Any]) -> None:
    case = next(case for case in covered_cases() if case.name == name)
    model = build(case)
    if "deepseek" in name:  # latents are never sealed
        options = options | {
            "format": {"k8v4": "int8/int4", "int4": "int4/int4"}.get(options["format"], options["format"])
        }
    config = model.config.get_text_config(decoder=True)
    caches = [hf_kvopt.QuantizedPagedCache(config, **options) for _ in range(2)]
    encoder = case.modality == "encoder"
    cache = EncoderDecoderCache(*caches) if encoder else caches[0]
    generate(model, inputs_for(case, model), **{hf_kvopt.CACHE_KEYWORD: cache})
    length = longest(caches[0])
    first = length - NEW_TOKENS + 1
    got = memory(model, context=length, prompt=first, batch=2, dtype="float32", weights=False, **options)
    live = caches[0].stats()
    assert (got.used_bytes, got.reserved_bytes) == (live.used_bytes, live.reserved_bytes)


@pytest.mark.parametrize("options", [{}, {"format": "int8"}, {"format": "int4/int4", "skip_layers": ()}], ids=str)
@pytest.mark.parametrize(("batch", "max_tokens"), [(1, 64), (3, 200), (2, 90), (3, 150)])
def test_fixed_capacity_is_used_from_the_start(batch: int, max_tokens: int, options: dict[str, Any]) -> None:
    model, limits = tiny_model("mixed"), {"max_tokens": max_tokens, "compileable": True}
    kind = hf_kvopt.QuantizedPagedCache if options else hf_kvopt.PagedCache
    cache = kind(model.config, **options, **limits)
    with torch.no_grad():
        model(**prompt(*[9] * batch), **{hf_kvopt.CACHE_KEYWORD: cache})
    got = memory(model, context=9, batch=batch, dtype="float32", weights=False, **options, **limits)
    live = cache.stats()
    assert (got.used_bytes, got.reserved_bytes) == (live.used_bytes, live.reserved_bytes)


def _taken(model: Any, batch: int, context: int, **options: Any) -> int:
    """Return the peak of the bytes that a live cache takes up to `context` tokens, free blocks included."""
    cache, most = hf_kvopt.PagedCache(model.config, **options), 0
    with torch.no_grad():
        for start in range(0, context, 500):
            model(**prompt(*[min(500, context - start)] * batch), **{hf_kvopt.CACHE_KEYWORD: cache})
            most = max(most, cache.stats().reserved_bytes)
    return most


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_the_largest_batch_and_context_fit_with_what_is_reserved_and_one_more_does_not(kind: str) -> None:
    model = tiny_model(kind)
    report = memory(model, context=100, batch=2, budget=900_000, dtype="float32")
    room = report.capacity
    assert room is not None
    assert room.kv_budget_bytes == 900_000 - report.weight_bytes

    def needed(batch: int, context: int) -> float:
        asked = memory(model, context=context, batch=batch, budget=900_000, dtype="float32").capacity
        assert asked is not None
        assert asked.fits == (asked.needed_bytes <= room.kv_budget_bytes)
        return asked.needed_bytes

    assert needed(room.max_batch, 100) <= room.kv_budget_bytes < needed(room.max_batch + 1, 100)
    assert needed(2, room.max_context) <= room.kv_budget_bytes < needed(2, room.max_context + 1)
    assert room.max_context < room.capped_context
    # Live caches of these sizes stay within the budget, however they grew.
    assert _taken(model, room.max_batch, 100) <= room.kv_budget_bytes
    assert _taken(model, 2, room.max_context) <= room.kv_budget_bytes
    cap = 2 * -(-room.capped_context // 16) * 16
    assert _taken(model, 2, room.capped_context, max_tokens=cap) <= room.kv_budget_bytes
    with pytest.raises(KVOptError, match="raise max_tokens"):
        _taken(model, 2, room.capped_context + 16, max_tokens=cap)


def test_the_largest_context_of_a_capped_cache_is_its_cap() -> None:
    model = tiny_model("mixed")
    room = memory(model, context=100, max_tokens=160, budget="1GiB", dtype="float32").capacity
    assert room is not None
    assert (room.max_context, room.max_batch) == (160, 1)
    assert room.capped_context > 1000
    with pytest.raises(KVOptError, match="raise max_tokens"):
        _taken(model, 1, 161, max_tokens=160)


def test_weights_beyond_the_budget_leave_no_room_and_all_else_is_told() -> None:
    model = tiny_model("full")
    report = memory(model, context=100, batch=2, budget="1KiB", dtype="float32")
    room = report.capacity
    assert room is not None
    assert room.kv_budget_bytes == 1024 - report.weight_bytes < 0
    assert (room.fits, room.max_context, room.max_batch, room.capped_context) == (False, 0, 0, 0)
    assert report.used_bytes > 0


def test_weights_counted_without_making_them_are_those_of_the_model() -> None:
    model = tiny_model("mixed")
    report = memory(model.config, context=8, dtype="float16")
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    assert report.weight_bytes == 2 * report.num_parameters
