"""A decode step under torch.compile(fullgraph=True): one graph, and the bits of the same step outside of one.

The graph calls the code that runs without it, so logits are compared with torch.equal. Inductor alone is given a bound:
it fuses the model's own norms and products, and so sums them in another order. Most graphs run by the "eager" backend,
which is quickest to compile and calls the same operations.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

import hf_kvopt
from hf_kvopt import CACHE_KEYWORD, CacheStateError, OutOfBlocks, PagedCache, QuantizedPagedCache
from hf_kvopt.kernels.cpu import paged_attention, store
from tests.attention.models import case_named
from tests.cache.graphs import compiled, decoded
from tests.helpers import generate, prompt, tiny_model
from tests.models.tiny import build

pytestmark = pytest.mark.usefixtures("fresh_graphs")
ROW, PADDED = 64, (17, 33, 5)
FORMATS = ("native", "int8", "fp8_e4m3", "fp8_e5m2", "int4/int4", "int8/int4")


def new_cache(model: PreTrainedModel, name: str, batch: int, *, fixed: bool = True, **options: Any) -> PagedCache:
    """Build a cache of a format, of ROW tokens a row or growing."""
    capacity: dict[str, Any] = {"max_tokens": batch * ROW, "compileable": True} if fixed else {}
    if name == "native":
        return PagedCache(model.config, **capacity)
    return QuantizedPagedCache(model.config, format=name, **{"skip_layers": (), **capacity, **options})


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """Shift the slowest rotary pair of all keys, as the biases of Qwen2.5 do, so that there is something to guard."""
    for path, module in model.named_modules():
        if path.endswith("k_proj"):
            head_dim = model.config.head_dim
            bias = torch.zeros(module.out_features // head_dim, head_dim)
            bias[:, head_dim // 2 - 1], bias[:, -1] = 25.0, -25.0
            module.bias = torch.nn.Parameter(bias.flatten())
    return model


def logits_of(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    cache: PagedCache,
    lengths: tuple[int, ...] = PADDED,
    steps: int = 4,
    *,
    fixed: bool = True,
) -> Tensor:
    """Return what `decoded` does for a cache of ROW tokens a row, or for one that grows."""
    return decoded(forward, model, cache, lengths, steps, ROW if fixed else None)


def assert_same_step(
    model: PreTrainedModel, make: Callable[..., PagedCache], lengths: tuple[int, ...] = PADDED, steps: int = 4
) -> None:
    """Compare compiled steps over two caches with uncompiled ones, and those with a growing cache's.

    Behind a window the growing cache hands out a prompt's states at once and sums in another order, by which a code may
    be rounded to the next one: there the tokens are compared.
    """
    step, counter = compiled(model)
    want = logits_of(model, model, make(), lengths, steps)
    for _ in range(2):
        assert torch.equal(logits_of(step, model, make(), lengths, steps), want)
        assert counter.frame_count == 1
    growing = make(fixed=False)
    got = logits_of(model, model, growing, lengths, steps, fixed=False)
    slides = any(layer.is_sliding for layer in growing.layers)
    assert torch.equal(got.argmax(-1), want.argmax(-1)) if slides else torch.equal(got, want)


@pytest.mark.parametrize(("kind", "name"), [*(("full", name) for name in FORMATS), ("mixed", "int8")])
def test_a_step_is_one_graph_for_every_length_and_cache(kind: str, name: str) -> None:
    model = tiny_model(kind)
    assert_same_step(model, lambda **options: new_cache(model, name, 3, **options))


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["int8"])
def test_a_backend_that_takes_operations_apart_gives_the_same_bits(name: str) -> None:
    model = loud(tiny_model())
    step, counter = compiled(model, "aot_eager")
    want = logits_of(model, model, new_cache(model, name, 3))
    assert torch.equal(logits_of(step, model, new_cache(model, name, 3)), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["int4/int4"])
def test_inductor_differs_by_rounding_alone_and_copies_no_pool(name: str) -> None:
    model = tiny_model()
    step, counter = compiled(model, "inductor")
    want = logits_of(model, model, new_cache(model, name, 3))
    cache = new_cache(model, name, 3)
    addresses = [x.data_ptr() for layer in cache.layers if layer.pool for p in layer.pool.planes for x in p.tensors]
    got = logits_of(step, model, cache)
    # Sums of 48 products in two layers, in another order: a few units in the last place of the largest logit.
    assert (got - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()
    assert counter.frame_count == 1
    after = [x.data_ptr() for layer in cache.layers for p in layer.pool.planes for x in p.tensors]
    assert after[: len(addresses)] == addresses


MIXED = {
    "pairs": {"format": "int8/int4", "layer_formats": {0: "native/int8", 1: "fp8_e4m3/int4"}},
    "a native layer": {"format": "int4/int4", "layer_formats": {"first": "native"}, "exact_prefill": True},
}


@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
def test_layers_of_unlike_formats_are_one_graph(options: dict[str, Any]) -> None:
    model = loud(tiny_model())
    settings = {"skip_layers": (), **options}

    def make(*, fixed: bool = True) -> PagedCache:
        capacity: dict[str, Any] = {"max_tokens": 3 * ROW, "compileable": True} if fixed else {}
        return QuantizedPagedCache(model.config, **settings, **capacity)

    assert_same_step(model, make)


@pytest.mark.parametrize(("name", "lengths"), [("int8", (12, 5, 9)), ("int4/int4", (2,))], ids=str)
def test_rows_that_begin_short_learn_their_shift_in_the_graph(name: str, lengths: tuple[int, ...]) -> None:
    model, batch = loud(tiny_model()), len(lengths)
    step, counter = compiled(model)
    fixed, traced = (new_cache(model, name, batch) for _ in range(2))
    growing = new_cache(model, name, batch, fixed=False)
    want = logits_of(model, model, fixed, lengths, 18)
    assert torch.equal(logits_of(step, model, traced, lengths, 18), want)
    assert torch.equal(logits_of(model, model, growing, lengths, 18, fixed=False), want)
    assert all(bool(layer.centres.vectors.any()) for layer in traced.layers)
    for ours, other, third in zip(traced.layers, fixed.layers, growing.layers, strict=True):
        assert torch.equal(ours.keys.clone(), other.keys.clone())
        assert torch.equal(ours.keys.clone(), third.keys.clone())
    # A row with another history, in the same graph.
    assert torch.equal(
        logits_of(step, model, new_cache(model, name, batch), (20,) * batch),
        logits_of(model, model, new_cache(model, name, batch), (20,) * batch),
    )
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["int4/int4"])
def test_compiled_and_uncompiled_steps_take_turns(name: str) -> None:
    model = loud(tiny_model())
    step, _ = compiled(model)
    want = logits_of(model, model, new_cache(model, name, 1), (7,), 20)
    for turn in (2, 11):
        count = iter(range(20))

        def forward(*args: Any, count: Iterator[int] = count, turn: int = turn, **kwargs: Any) -> Any:
            return (step if next(count) % turn else model)(*args, **kwargs)

        assert torch.equal(logits_of(forward, model, new_cache(model, name, 1), (7,), 20), want)


@pytest.mark.parametrize(
    ("type_name", "name"),
    [("gpt_oss", "int8"), ("gemma2", "int4/int4"), ("deepseek_v3 enabled", "int4/int4")],
)
def test_sinks_caps_and_latents_are_as_outside_of_a_graph(type_name: str, name: str) -> None:
    model = build(case_named(type_name.split()[0]), hf_kvopt.ATTENTION_NAME)
    model = model if "deepseek" in type_name else loud(model)
    if "enabled" in type_name:
        hf_kvopt.enable(model)
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, name, 3))
    for _ in range(2):
        assert torch.equal(logits_of(step, model, new_cache(model, name, 3)), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("attention", "name"), [("sdpa", "native"), ("eager", "int8"), ("eager", "int4/int4")])
def test_transformers_own_attention_reads_a_compiled_cache(attention: str, name: str) -> None:
    model = loud(tiny_model("full", attention))
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, name, 3))
    got = logits_of(step, model, new_cache(model, name, 3))
    # PyTorch's SDPA sums in another order where it is traced, over native storage too.
    bound = 64 * torch.finfo(torch.float32).eps * want.abs().max() if attention == "sdpa" else 0.0
    assert (got - want).abs().max() <= bound
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["int4/int4"])
def test_a_cpu_without_kernels_of_its_own_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (paged_attention, store):
        monkeypatch.setattr(module, "can_compile", lambda: False)
    model = loud(tiny_model())
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, name, 3))
    assert torch.equal(logits_of(step, model, new_cache(model, name, 3)), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["int8"])
def test_a_compiled_prompt_is_stored_and_read_as_an_uncompiled_one(name: str) -> None:
    model = loud(tiny_model())
    config = model.config
    step, counter = compiled(model)
    want = logits_of(model, model, new_cache(model, name, 3))
    for _ in range(2):
        cache = new_cache(model, name, 3)
        cache.early_initialization(3, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
        assert torch.equal(logits_of(step, step, cache), want)  # type: ignore[arg-type]
    assert counter.frame_count == 2  # a prompt's, and a step's


def test_a_cache_without_memory_says_how_to_give_it_some() -> None:
    model = tiny_model()
    step, _ = compiled(model)
    with pytest.raises(Exception, match=r"feed it the prompt uncompiled, or call cache\.early_initialization"):
        logits_of(step, step, new_cache(model, "int8", 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_step_past_the_capacity_is_refused_and_other_rows_are_kept(backend: str) -> None:
    model = tiny_model()
    step, _ = compiled(model, backend)
    cache, other = new_cache(model, "int8", 2), new_cache(model, "int8", 2)
    ids = prompt(ROW, ROW)["input_ids"]
    with torch.no_grad():
        for each in (cache, other):
            model(ids[:, : ROW - 1], **{CACHE_KEYWORD: each})
        step(ids[:, -1:], **{CACHE_KEYWORD: cache})
        model(ids[:, -1:], **{CACHE_KEYWORD: other})
        for _ in range(2):
            with pytest.raises(OutOfBlocks, match=r"1 more tokens a row were asked for: got 64 of 64 used"):
                step(ids[:, :1], **{CACHE_KEYWORD: cache})
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys.clone(), theirs.keys.clone())
    cache.check_integrity()
    cache.reset()
    want = logits_of(model, model, new_cache(model, "int8", 2), (17, 33))
    assert torch.equal(logits_of(step, model, cache, (17, 33)), want)


def test_states_that_want_a_gradient_are_refused_in_a_graph_too() -> None:
    model, cache = tiny_model(), None
    cache = new_cache(model, "int8", 1)
    with torch.no_grad():
        model(**prompt(17), **{CACHE_KEYWORD: cache})
    step = torch.compile(model.forward, backend="aot_eager")
    with pytest.raises(CacheStateError, match="keeps no graph of its writes"):
        step(torch.tensor([[3]]), **{CACHE_KEYWORD: cache})


@pytest.mark.parametrize(("kind", "name"), [("full", "int8")])
def test_generate_compiles_the_step_by_itself(kind: str, name: str) -> None:
    model = loud(tiny_model(kind))
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    want = generate(model, prompt(*PADDED), new_cache(model, name, 3), disable_compile=True)
    assert not counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert torch.equal(generate(model, prompt(*PADDED), new_cache(model, name, 3), compile_config=config), want)
        assert counters["stats"]["unique_graphs"] == 1


def test_loud_keys_are_shifted_by_much() -> None:
    model = loud(tiny_model())
    cache = new_cache(model, "int4/int4", 1)
    logits_of(model, model, cache, (20,), 1)
    assert all(math.isfinite(x) and x > 1 for x in (layer.centres.vectors.abs().max() for layer in cache.layers))
