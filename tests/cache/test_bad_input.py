"""Wrong calls: one clear error each, which says what to do; afterwards no block is lost and the cache can be used."""

import re
from typing import Any

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, CacheConfig, CacheStateError, OutOfBlocks, PagedCache, enable
from tests.helpers import (
    KINDS,
    assert_usable,
    eager_continuation,
    eager_tokens,
    generate,
    prompt,
    states,
    tiny_config,
    tiny_model,
    unpadded,
)

TEXT = prompt(37)["input_ids"]


def prefilled(kind: str = "full", **options: Any) -> PagedCache:
    """Fill a cache with TEXT."""
    cache = PagedCache(config=tiny_config(kind), **options)
    with torch.no_grad():
        tiny_model(kind)(TEXT, **{CACHE_KEYWORD: cache})
    return cache


def assert_as_before(cache: PagedCache, kind: str = "full", model: Any = None) -> None:
    """Check that the cache still holds exactly TEXT and that generation goes on from there."""
    cache.check_integrity()
    assert cache.get_seq_length() == TEXT.shape[1]
    longer = torch.cat([TEXT, prompt(3, seed=4)["input_ids"]], dim=1)
    model = model if model is not None else tiny_model(kind)
    for layer in cache.layers:
        layer.pool.reads.owner = None  # the models of these tests are equal, not the same
    tokens = generate(model, unpadded(longer), cache, max_new_tokens=5)
    assert torch.equal(tokens, eager_continuation(kind, longer, max_new_tokens=5))
    cache.check_integrity()


@pytest.mark.smoke
@pytest.mark.parametrize("size", [0, 8, 24, 512, -16, 16.0, True, "16"], ids=repr)
def test_a_block_size_that_is_no_power_of_two_is_refused(size: Any) -> None:
    with pytest.raises(
        ValueError, match=f"block_size must be a power of two from 16 to 256: got {re.escape(repr(size))}"
    ):
        PagedCache(block_size=size)


@pytest.mark.parametrize("tokens", [0, -1, "x", 64.0, True], ids=repr)
def test_a_cap_that_is_no_number_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(ValueError, match=f"max_tokens must be a positive number.*got {re.escape(repr(tokens))}"):
        PagedCache(max_tokens=tokens)


def test_compileable_without_max_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compileable=True needs max_tokens.*got None; pass max_tokens="):
        CacheConfig(compileable=True)


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 2}, "llama", 3, tiny_model()], ids=["dict", "str", "int", "model"]
)
def test_a_config_of_the_wrong_type_is_refused(config: Any) -> None:
    with pytest.raises(
        TypeError, match=f"config must be a model's config, e.g. model.config: got {type(config).__name__}"
    ):
        PagedCache(config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_another_model_of_the_same_geometry_is_refused(kind: str) -> None:
    model, cache = tiny_model(kind), PagedCache(config=tiny_config(kind))
    with torch.no_grad():
        model(TEXT, **{CACHE_KEYWORD: cache})
    longer = torch.cat([TEXT, TEXT[:, :4]], dim=1)
    with pytest.raises(CacheStateError, match=r"filled by another model.*cache\.free\(\)"):
        generate(tiny_model(kind, seed=1), unpadded(longer), cache)
    assert_as_before(cache, kind, model)


def test_a_cache_of_another_geometry_is_refused() -> None:
    cache = prefilled()
    for layer in range(2):
        with pytest.raises(CacheStateError, match=r"holds keys and values of \[2, 8\].*got \[1, 4, 1, 8\]"):
            cache.update(*states(1, 1, num_heads=4), layer)
        with pytest.raises(CacheStateError, match="one cache a model"):
            cache.update(*(x.bfloat16() for x in states(1, 1)), layer)
    assert_as_before(cache)


@pytest.mark.parametrize("prompt_len", [37, 36, 20, 2], ids=["as long", "one longer", "longer", "far longer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_cache_that_is_not_shorter_than_the_prompt_is_refused(kind: str, prompt_len: int) -> None:
    model, cache = tiny_model(kind), PagedCache(config=tiny_config(kind))
    with torch.no_grad():
        model(TEXT, **{CACHE_KEYWORD: cache})
    with pytest.raises(CacheStateError, match=r"not shorter than the prompt.*cache\.reset\(\), or cache\.crop"):
        generate(model, unpadded(TEXT[:, :prompt_len]), cache)
    assert_as_before(cache, kind, model)


def test_a_reused_cache_is_refused_also_with_left_padding() -> None:
    model, cache, inputs = tiny_model(), PagedCache(), prompt(17, 33, 5)
    generate(model, inputs, cache)
    with pytest.raises(CacheStateError, match="not shorter than the prompt"):
        generate(model, inputs, cache)
    cache.check_integrity()
    cache.reset()
    assert torch.equal(generate(model, inputs, cache), eager_tokens("full", 17, 33, 5))


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_use_cache_false_beside_a_cache_is_refused(kind: str) -> None:
    cache = PagedCache(config=tiny_config(kind))
    model = tiny_model(kind)
    with pytest.raises((CacheStateError, ValueError)):
        generate(model, prompt(9, 6), cache, use_cache=False)
    cache.free()
    assert torch.equal(generate(model, prompt(9, 6), cache), eager_tokens(kind, 9, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_another_batch_size_is_refused(kind: str) -> None:
    cache = prefilled(kind)
    longer = torch.cat([TEXT, TEXT[:, :4]], dim=1).expand(3, -1)
    with pytest.raises(CacheStateError, match=r"holds 1 rows: got a batch of 3; call cache\.reset\(\)"):
        generate(tiny_model(kind), unpadded(longer), cache)
    assert_as_before(cache, kind)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_past_the_cap_is_refused_whole(kind: str) -> None:
    cache = PagedCache(config=tiny_config(kind), max_tokens=64)
    lengths = (70, 70, 70)
    with pytest.raises(OutOfBlocks, match=r"more tokens was asked for: got \d+ of 64 left.*raise max_tokens"):
        generate(tiny_model(kind), prompt(*lengths), cache)
    assert (cache.get_seq_length(), cache.stats().used_blocks) == (0, 0)
    assert_usable(cache, kind)


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_a_step_past_the_cap_leaves_all_layers_at_the_step_before(kind: str) -> None:
    cache = PagedCache(config=tiny_config(kind), max_tokens=48)
    model = tiny_model(kind)
    with pytest.raises(OutOfBlocks):
        generate(model, unpadded(TEXT), cache, max_new_tokens=40)
    cache.check_integrity()
    assert cache.get_seq_length() == 48
    assert {layer.get_seq_length() for layer in cache.layers} == {48}
    tokens = eager_continuation(kind, TEXT, max_new_tokens=40)
    cache.crop(0)
    if kind == "full":
        cache.crop(-5)
        assert torch.equal(generate(model, unpadded(tokens[:, :46]), cache, max_new_tokens=3), tokens[:, :49])


@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
def test_a_layer_that_never_stores_does_not_cost_the_others_their_tokens(has_config: bool) -> None:
    config = tiny_config("full")
    config.num_hidden_layers = 3
    cache = PagedCache(config=config if has_config else None, max_tokens=48)
    for layer in (0, 2):
        cache.update(*states(1, 30, seed=layer), layer)
    with pytest.raises(OutOfBlocks):
        cache.update(*states(1, 30), 0)
    assert cache.get_seq_length() == 30
    for layer in (0, 2):
        assert torch.equal(cache.layers[layer].keys.clone(), states(1, 30, seed=layer)[0])


def test_states_that_require_gradients_are_refused() -> None:
    model, cache = tiny_model(), PagedCache()
    with pytest.raises(CacheStateError, match=r"keeps no graph.*torch\.no_grad\(\)"):
        model(TEXT, **{CACHE_KEYWORD: cache})
    assert cache.stats().used_blocks == 0
    assert_usable(cache)


def test_a_growing_cache_is_refused_under_torch_compile() -> None:
    cache = prefilled()
    update = torch.compile(lambda k, v: cache.update(k, v, 0), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"PagedCache\(max_tokens=\.\.\., compileable=True\)"):
        update(*states(1, 1))
    torch._dynamo.reset()
    assert_as_before(cache)


def test_a_compiled_model_names_the_cache_that_it_needs() -> None:
    model = torch.compile(tiny_model(), backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match=r"PagedCache\(max_tokens=\.\.\., compileable=True\)"):
        model(TEXT, **{CACHE_KEYWORD: PagedCache()})
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_one_layer_alone_cannot_change_length_or_batch(name: str) -> None:
    cache = prefilled()
    arguments = () if name == "reset" else (torch.tensor([0]) if "in" in name or "order" in name else -1,)
    with pytest.raises(CacheStateError, match=rf"{name} was called on one layer.*call cache\.{name}\(\.\.\.\)"):
        getattr(cache.layers[0], name)(*arguments)
    assert_as_before(cache)


@pytest.mark.parametrize("kind", KINDS)
def test_crop_by_a_positive_number_is_refused(kind: str) -> None:
    cache = prefilled(kind)
    with pytest.raises(ValueError, match="as 0 or less: got 3"):
        cache.crop(3)
    assert_as_before(cache, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_is_held_cannot_be_cropped(kind: str) -> None:
    cache = prefilled(kind)
    with pytest.raises(CacheStateError, match=r"cannot crop to -1 tokens: got a cache that holds tokens \d+ to 37"):
        cache.crop(-38)
    assert_as_before(cache, kind)


@pytest.mark.parametrize("kind", ["sliding", "mixed"])
def test_a_window_that_is_gone_cannot_be_cropped_to(kind: str) -> None:
    cache = prefilled(kind)
    with pytest.raises(CacheStateError, match=r"cannot crop to 7 tokens.*activate_past_recording\(\)"):
        cache.crop(-30)
    assert_as_before(cache, kind)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("kind", "layer_idx"), [("full", 1), ("mixed", 1), ("mixed", 2)])
def test_a_forward_that_broke_off_is_taken_back_and_said(kind: str, layer_idx: int, error: type[BaseException]) -> None:
    model, cache = tiny_model(kind), PagedCache(config=tiny_config(kind))
    layers = model.model.layers
    with torch.no_grad():
        model(TEXT, **{CACHE_KEYWORD: cache})

    def break_off(*_: Any) -> None:
        raise error

    hook = layers[layer_idx].register_forward_pre_hook(break_off)
    longer = unpadded(torch.cat([TEXT, TEXT[:, :4]], dim=1))
    with pytest.raises(error):
        generate(model, longer, cache)
    hook.remove()
    with pytest.raises(CacheStateError, match=r"half way.*taken back and \d+ are left, so call the model again"):
        generate(model, longer, cache)
    assert_as_before(cache, kind, model)


def test_offloading_without_a_gpu_is_refused_when_the_cache_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"offloading=True on a machine without one; drop it"):
        PagedCache(offloading=True)
    with pytest.raises(ValueError, match=r"offloading=True on a machine without one; drop it"):
        enable(tiny_model(), cache="int8", offloading=True)
