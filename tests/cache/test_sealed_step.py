"""Sealed blocks of fixed capacity: a compiled step gives the bits of a growing cache, block after block."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from hf_kvopt import CACHE_KEYWORD, CacheStateError, OutOfBlocks, QuantizedPagedCache, enable
from tests.cache.graphs import compiled, decoded
from tests.cache.sealed import FORMATS
from tests.helpers import generate, prompt, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_graphs")
BLOCK, ROW = 16, 160
PADDED = (37, 64, 5)


def new_cache(
    model: PreTrainedModel, name: str, batch: int = 3, *, fixed: bool = True, **options: Any
) -> QuantizedPagedCache:
    """Build a cache of ROW tokens a row, or a growing one."""
    capacity: dict[str, Any] = {"max_tokens": batch * ROW, "compileable": True} if fixed else {}
    return QuantizedPagedCache(model.config, format=name, skip_layers=(), block_size=BLOCK, **capacity, **options)


def logits_of(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    cache: QuantizedPagedCache,
    lengths: tuple[int, ...] = PADDED,
    steps: int = 50,
) -> Tensor:
    """Return what `decoded` does for a cache of ROW tokens a row, or for one that grows."""
    return decoded(forward, model, cache, lengths, steps, ROW if cache.is_compileable else None)


@pytest.mark.parametrize("name", FORMATS)
def test_steps_are_one_graph_and_equal_those_of_a_growing_cache(name: str) -> None:
    model = tiny_model()
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, name, fixed=False))
    assert torch.equal(logits_of(model, model, new_cache(model, name)), want)
    for _ in range(2):
        assert torch.equal(logits_of(step, model, new_cache(model, name)), want)
        assert counter.frame_count == 1


def test_a_second_turn_a_cut_and_a_new_text_go_on_as_in_a_growing_cache() -> None:
    model = tiny_model()
    fixed, growing = new_cache(model, "int4", 1), new_cache(model, "int4", 1, fixed=False)
    ids = prompt(70)["input_ids"]

    def texts(cache: QuantizedPagedCache) -> Iterator[Tensor]:
        for _ in range(2):
            for part in (ids[:, :37], *ids[:, 37:60].split(1, dim=1), ids, ids[:, :3]):
                yield model(part, **{CACHE_KEYWORD: cache}).logits
            cache.crop(-5)
            for part in (ids[:, :1], ids[:, :9]):
                yield model(part, **{CACHE_KEYWORD: cache}).logits
            cache.check_integrity()
            cache.reset()

    with torch.no_grad():
        for got, want in zip(texts(fixed), texts(growing), strict=True):
            assert torch.equal(got, want)


def test_inductor_differs_by_rounding_alone_and_writes_the_pools_where_they_lie() -> None:
    model = tiny_model()
    cache, want = new_cache(model, "int4"), logits_of(model, model, new_cache(model, "int4"), steps=20)
    step, counter = compiled(model, "inductor")
    got, parts = run_and_get_code(lambda: logits_of(step, model, cache, steps=20))
    # Sums of 48 products in two layers, in another order: a few units in the last place of the largest logit.
    assert (got - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()
    assert counter.frame_count == 1
    code = "\n".join(parts)
    assert code.count("hf_kvopt.write_sealed.default(") == len(cache.layers)
    made = {int(size) for size in re.findall(r"= empty_strided_cpu\(\((\d+),", code)}
    assert made.isdisjoint({len(x) for layer in cache.layers for plane in layer.pool.planes for x in plane.tensors})


@pytest.mark.parametrize("attention", ["sdpa"])
def test_transformers_own_attention_reads_a_compiled_sealed_cache(attention: str) -> None:
    model = tiny_model("full", attention)
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, "int4", fixed=False), steps=20)
    got = logits_of(step, model, new_cache(model, "int4"), steps=20)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_an_enabled_model_generates_the_tokens_of_a_growing_cache(kind: str) -> None:
    inputs, options = prompt(150, 90, 3), {"max_new_tokens": 40, "do_sample": False}
    want = enable(tiny_model(kind), "int4").generate(**inputs, **options)
    model = enable(tiny_model(kind), "int4", max_tokens=3 * 192, compileable=True)
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    assert torch.equal(model.generate(**inputs, **options), want)
    assert not counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **options, compile_config=config), want)
        assert counters["stats"]["unique_graphs"] == 1
    with pytest.raises(OutOfBlocks, match="got room for 192 in each of 3 rows"):
        model.generate(**inputs, max_new_tokens=50)


@pytest.mark.parametrize("draft", ["prompt_lookup", "lookahead"])
def test_drafts_give_the_tokens_of_a_growing_cache(draft: str) -> None:
    inputs, options = prompt(70, 30), {"max_new_tokens": 60, "do_sample": False}
    want = enable(tiny_model(), "int4", block_size=BLOCK).generate(**inputs, **options)
    fixed = {"block_size": BLOCK, "max_tokens": 2 * ROW, "compileable": True}
    assert torch.equal(enable(tiny_model(), "int4", draft=draft, **fixed).generate(**inputs, **options), want)


@torch.no_grad()
def test_a_token_past_the_capacity_is_refused_and_the_rest_is_kept() -> None:
    model, cache = tiny_model(), None
    cache = new_cache(model, "int4", 1)
    ids = prompt(ROW)["input_ids"]
    step, _ = compiled(model)
    model(ids[:, :-1], **{CACHE_KEYWORD: cache})
    step(ids[:, -1:], **{CACHE_KEYWORD: cache})
    for forward in (model, step):
        with pytest.raises(OutOfBlocks, match=f"1 more tokens a row were asked for: got {ROW} of {ROW} used"):
            forward(ids[:, :1], **{CACHE_KEYWORD: cache})
    assert int(cache.get_seq_length()) == ROW
    cache.check_integrity()


@torch.no_grad()
def followed(
    forward: Callable[..., Any], model: PreTrainedModel, cache: QuantizedPagedCache, ids: Tensor, steps: int
) -> Tensor:
    """Feed ids [batch, tokens], then decode greedily; returns logits [steps + 1, batch, vocab]."""
    out = model(ids, **{CACHE_KEYWORD: cache})
    found = [out.logits[:, -1].clone()]
    for _ in range(steps):
        out = forward(found[-1].argmax(-1)[:, None], **{CACHE_KEYWORD: cache})
        found.append(out.logits[:, -1].clone())
    return torch.stack(found)


@pytest.mark.parametrize("place", [3, 40])
def test_rows_that_change_places_stay_one_graph_and_equal_those_of_a_growing_cache(place: int) -> None:
    model = tiny_model()
    step, counter = compiled(model)
    ids, found = prompt(40, 40, 40, seed=2)["input_ids"], []
    for fixed in (False, True):
        cache = new_cache(model, "int4", fixed=fixed)
        forward = step if fixed else model
        parts = [followed(forward, model, cache, ids, place)]
        for order in ([1, 1, 0], [2, 0, 1]):
            cache.reorder_cache(torch.tensor(order))
            parts.append(followed(forward, model, cache, ids[:, :2], 20))
        cache.check_integrity()
        found.append(torch.cat(parts))
    assert torch.equal(*found)
    assert counter.frame_count == 1


def test_beams_give_the_tokens_of_a_growing_cache() -> None:
    model, options = tiny_model(), {"num_beams": 3, "max_new_tokens": 40, "disable_compile": True}
    want = generate(model, prompt(30), new_cache(model, "int4", fixed=False), **options)
    cache = new_cache(model, "int4")
    assert torch.equal(generate(model, prompt(30), cache, **options), want)
    cache.check_integrity()


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_copy_goes_on_by_itself_in_memory_of_its_own(is_compiled: bool) -> None:
    model = tiny_model()
    forward = compiled(model)[0] if is_compiled else model
    ids = prompt(40, 40, 40)["input_ids"]
    growing, fixed = new_cache(model, "k4v2", fixed=False), new_cache(model, "k4v2")
    assert torch.equal(followed(forward, model, fixed, ids, 25), followed(model, model, growing, ids, 25))
    twins = copy.deepcopy(fixed), copy.deepcopy(growing)
    others = prompt(20, 20, 20, seed=3)["input_ids"], prompt(7, 7, 7, seed=4)["input_ids"]
    for more in others:
        for one, other in ((fixed, growing), twins):
            got, want = followed(forward, model, one, more, 20), followed(model, model, other, more, 20)
            assert torch.equal(got, want)
            one.check_integrity()
        fixed, growing = twins


@pytest.mark.parametrize("name", ["k8v4"])
def test_layers_that_seal_and_layers_that_do_not_are_one_graph(name: str) -> None:
    model, found = tiny_model("mixed"), []
    step, counter = compiled(model)
    for fixed in (False, True):
        capacity: dict[str, Any] = {"max_tokens": 3 * ROW, "compileable": True} if fixed else {}
        cache = QuantizedPagedCache(model.config, format=name, block_size=BLOCK, **capacity)
        found.append(logits_of(step if fixed else model, model, cache))
        assert sum(layer.format.sealed is not None for layer in cache.layers) == 1
        cache.check_integrity()
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("lengths", [(37, 0, 5), (16, 15, 17), (1, 33, 2)], ids=str)
def test_short_and_empty_rows_equal_those_of_a_growing_cache(lengths: tuple[int, ...]) -> None:
    model = tiny_model()
    want = logits_of(model, model, new_cache(model, "int4", fixed=False), lengths)
    assert torch.equal(logits_of(model, model, new_cache(model, "int4"), lengths), want)


@torch.no_grad()
def test_another_batch_is_refused_in_one_sentence() -> None:
    model = tiny_model()
    cache = new_cache(model, "int4")
    logits_of(model, model, cache, steps=1)
    with pytest.raises(CacheStateError, match=r"holds 3 rows: got a batch of 1; free\(\)"):
        model(prompt(4)["input_ids"], **{CACHE_KEYWORD: cache})
    with pytest.raises(CacheStateError, match=r"keeps its batch size of 3: got 2 rows"):
        cache.reorder_cache(torch.tensor([0, 1]))
    cache.free()
    want = logits_of(model, model, new_cache(model, "int4", 1, fixed=False), (5,), 20)
    assert torch.equal(logits_of(model, model, cache, (5,), 20), want)
