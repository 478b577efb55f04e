"""Models that pass through some layers several times, with keys and values of their own for each pass.

hrm_text              its config names a layer of the cache for each pass
dory                  appends deep copies of cache layers to the cache in its first forward
inkling2_loop_text    the same, with convolution states beside the keys
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

import hf_kvopt
from hf_kvopt import CACHE_KEYWORD, PagedCache, PrefixStore, QuantizedPagedCache
from hf_kvopt.errors import CacheStateError
from hf_kvopt.plan.geometry import layers_of
from hf_kvopt.plan.kv_bytes import CacheSpec
from hf_kvopt.quant import FormatPolicy, dequantize, get_kv_format, quantize
from tests.models.cases import Case, covered_cases
from tests.models.inputs import Inputs, inputs_for
from tests.models.tiny import build
from tests.speculation.drafters import Oracle

LOOPED = {case.name: case for case in covered_cases() if case.name in ("hrm_text", "dory", "inkling2_loop_text")}
ALL = pytest.mark.parametrize("case", LOOPED.values(), ids=LOOPED)
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 5},
    "chunks beyond the window": {"prefill_chunk_size": 9},
}


def tokens(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    """Generate, with the same draws for the same options."""
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


def inputs_of(case: Case) -> Inputs:
    return inputs_for(case, build(case))


@ALL
@pytest.mark.parametrize("attention", [True, False], ids=["our attention", "the cache alone"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_every_way_to_generate_gives_the_eager_tokens(case: Case, attention: bool, options: dict[str, Any]) -> None:
    model = hf_kvopt.enable(build(case), attention=attention)
    assert torch.equal(tokens(model, inputs_of(case), **options), tokens(build(case), inputs_of(case), **options))


@ALL
def test_a_cache_and_its_copy_go_on_apart_as_those_of_transformers_do(case: Case) -> None:
    def talk(model: PreTrainedModel, cache: Cache) -> list[Tensor]:
        inputs = inputs_of(case)
        first = tokens(model, inputs, max_new_tokens=6, **{CACHE_KEYWORD: cache})
        twin = copy.deepcopy(cache)
        said = []
        for question, used, options in (
            (inputs["input_ids"][:, -3:], cache, {}),
            (first[:, :4], twin, {"num_beams": 1}),
        ):
            text = torch.cat([first, question], dim=1)
            mask = torch.nn.functional.pad(
                inputs["attention_mask"], (0, text.shape[1] - inputs["input_ids"].shape[1]), value=1
            )
            said.append(tokens(model, {"input_ids": text, "attention_mask": mask}, **{CACHE_KEYWORD: used}, **options))
        return said

    model = build(case, hf_kvopt.ATTENTION_NAME)
    paged = PagedCache(config=model.config)
    for ours, theirs in zip(talk(model, paged), talk(build(case), DynamicCache(config=model.config)), strict=True):
        assert torch.equal(ours, theirs)
    paged.check_integrity()
    assert paged.stats().num_tokens
    paged.reset()
    assert paged.stats().used_blocks == 0


@ALL
@pytest.mark.parametrize("attention", ["eager", hf_kvopt.ATTENTION_NAME])
def test_a_crop_takes_back_tokens_of_all_passes(case: Case, attention: str) -> None:
    def tried(model: PreTrainedModel, cache: Cache) -> list[Tensor]:
        ids = inputs_of(case)["input_ids"][:1]
        cache.activate_past_recording()
        logits = []
        with torch.no_grad():
            for text in (ids, ids[:, 2:7], ids[:, 5:8]):
                logits.append(model(text, use_cache=True, **{CACHE_KEYWORD: cache}).logits[:, -1])
                cache.crop(-2 if text is not ids else 0)
        return logits

    model = build(case, attention)
    want = tried(build(case), DynamicCache(config=model.config))
    for ours, theirs in zip(tried(model, PagedCache(config=model.config)), want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@ALL
@pytest.mark.parametrize("attention", ["eager", hf_kvopt.ATTENTION_NAME])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_cache_of_fixed_capacity_gives_the_eager_tokens(case: Case, attention: str, options: dict[str, Any]) -> None:
    model = build(case, attention)
    cache = PagedCache(config=model.config, max_tokens=6 * 32, compileable=True)
    got = tokens(model, inputs_of(case), disable_compile=True, **{CACHE_KEYWORD: cache}, **options)
    assert torch.equal(got, tokens(build(case), inputs_of(case), **options))


@ALL
def test_the_planner_knows_the_layers_of_all_passes_and_their_formats(case: Case) -> None:
    model = build(case)
    policy = {"format": "int8", "skip_layers": ("last",), "layer_formats": {1: "int4"}}
    cache = QuantizedPagedCache(config=model.config, **policy)
    with torch.no_grad():
        model(inputs_of(case)["input_ids"], use_cache=True, **{CACHE_KEYWORD: cache})
    layers = layers_of(model.config)
    planned = CacheSpec(formats=FormatPolicy(**policy)).formats_of(layers)
    assert [fmt.name for fmt in planned] == [layer.format.name for layer in cache.layers]
    assert [layer.window for layer in layers] == [layer.table.window for layer in cache.layers]


def stored_as(cache: DynamicCache, name: str) -> DynamicCache:
    """Let the layers of transformers' cache keep what a format makes of the states, copies of them too."""
    fmt = get_kv_format(name)

    def update_with(update: Callable[..., Any]) -> Callable[..., Any]:
        def update_as_stored(layer: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            stored = (dequantize(*quantize(x, f), f, x.dtype) for x, f in ((key, fmt.k), (value, fmt.v)))
            return update(layer, *stored, *args, **kwargs)

        return update_as_stored

    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            kind = type(layer)
            layer.__class__ = type(f"Stored{kind.__name__}", (kind,), {"update": update_with(kind.update)})
    return cache


@ALL
@pytest.mark.parametrize("name", ["int8", "fp8_e5m2", "int4/int4", "int8/int4"])
def test_a_quantized_cache_gives_the_tokens_of_the_states_it_stores(case: Case, name: str) -> None:
    model = build(case)
    paged = QuantizedPagedCache(config=model.config, format=name, skip_layers=(), guard="off")
    dynamic = stored_as(DynamicCache(config=model.config), name)
    got, want = (tokens(model, inputs_of(case), num_beams=2, **{CACHE_KEYWORD: cache}) for cache in (paged, dynamic))
    assert torch.equal(got, want)


@ALL
def test_speculation_gives_the_eager_tokens(case: Case) -> None:
    model, inputs = build(case), inputs_of(case)
    wanted = tokens(model, inputs, max_new_tokens=40)
    drafting = hf_kvopt.speculative(Oracle(wanted), fallback=False)
    hf_kvopt.enable(model, draft=drafting)
    assert torch.equal(tokens(model, inputs, max_new_tokens=40), wanted)
    assert sum(drafting.stats.accepted_by_depth)


@ALL
def test_a_shared_prefix_is_used_by_all_passes(case: Case, tmp_path: Path) -> None:
    model = build(case)
    hf_kvopt.enable(model, prefix_sharing=True)
    # Two rows that begin alike: the store, still empty, reads one of them ahead of the batch.
    begin = torch.cat([inputs_of(case)["input_ids"][:1] + i for i in range(4)], dim=1)
    long = torch.cat([begin.repeat(2, 1), torch.tensor([[5, 6], [7, 8]])], dim=1)
    for ids in (long, long, begin):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(tokens(model, inputs), tokens(build(case), inputs))
    stats = hf_kvopt.prefix_store(model).stats()
    assert stats.hits == 3
    assert stats.hit_tokens >= 3 * 32
    hf_kvopt.prefix_store(model).save(tmp_path / "store")
    hf_kvopt.disable(model)
    store = PrefixStore.load(tmp_path / "store", model)
    hf_kvopt.enable(model, prefix_sharing=store)
    assert torch.equal(tokens(model, inputs), tokens(build(case), inputs))
    assert store.stats().hits == 1
    # A cache that is emptied keeps the layers that the model appended.
    cache = store.new_cache()
    for hits in (2, 3):
        assert torch.equal(tokens(model, inputs, **{CACHE_KEYWORD: cache}), tokens(build(case), inputs))
        assert store.stats().hits == hits
        cache.reset()
    store.check_integrity()


if "dory" in LOOPED:  # not in every transformers

    @pytest.mark.parametrize("attention", [True, False], ids=["our attention", "the cache alone"])
    def test_passes_that_read_the_past_of_a_later_layer_are_refused(attention: bool) -> None:
        # Its first passes read what the last one wrote in the forwards before, after the cache has moved on.
        model = build(LOOPED["dory"])
        model.config.recurrent_kv_cache_mode = "last_loop"
        hf_kvopt.enable(model, attention=attention)
        with pytest.raises(CacheStateError, match="where the model's own code does this, use transformers' cache"):
            tokens(model, inputs_of(LOOPED["dory"]))

    def test_passes_without_writes_are_refused_by_fixed_capacity() -> None:
        model = build(LOOPED["dory"], hf_kvopt.ATTENTION_NAME)
        model.config.recurrent_kv_cache_mode = "last_loop"
        cache = PagedCache(config=model.config, max_tokens=64, compileable=True)
        with pytest.raises(CacheStateError, match="attention_mask covers 32 keys: got 13"):
            tokens(model, inputs_of(LOOPED["dory"]), disable_compile=True, **{CACHE_KEYWORD: cache})
