"""Fixed capacity: the same tokens in eager mode, one graph under torch.compile, clear errors at its limits."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_kvopt import CACHE_KEYWORD, CacheStateError, OutOfBlocks, PagedCache
from tests.helpers import eager_tokens, generate, prompt, states, tiny_config, tiny_model

LENGTHS, ROW = (17, 33, 5), 64


def fixed(kind: str = "full", batch: int = 3) -> PagedCache:
    """Build a cache of ROW tokens a row."""
    return PagedCache(config=tiny_config(kind), max_tokens=batch * ROW, compileable=True)


def decode(forward: Callable[..., Any], model: Any, cache: PagedCache, num_tokens: int) -> torch.Tensor:
    """Prefill with the model and decode with `forward`, as generate() feeds a compiled step."""
    inputs = prompt(*LENGTHS)
    mask, steps = inputs["attention_mask"], []
    with torch.no_grad():
        out = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_KEYWORD: cache})
        for _ in range(num_tokens):
            steps.append(out.logits[:, -1].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            full = torch.zeros(len(mask), ROW, dtype=mask.dtype)
            full[:, : mask.shape[1]] = mask
            positions = (mask.sum(-1, keepdim=True) - 1).contiguous()
            out = forward(steps[-1][:, None], attention_mask=full, position_ids=positions, **{CACHE_KEYWORD: cache})
    return torch.stack(steps, dim=1)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_tokens_are_those_of_eager(kind: str) -> None:
    model, cache = tiny_model(kind), fixed(kind)
    tokens = generate(model, prompt(*LENGTHS), cache, disable_compile=True)
    assert torch.equal(tokens, eager_tokens(kind, *LENGTHS))
    cache.check_integrity()


def test_a_decode_step_is_one_graph_for_every_length_and_cache() -> None:
    model = tiny_model()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    expected = eager_tokens("full", *LENGTHS)[:, -12:]
    for _ in range(2):
        assert torch.equal(decode(step, model, fixed(), 6), expected[:, :6])
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_reset_starts_anew_and_another_batch_is_refused_until_free() -> None:
    model, cache = tiny_model(), fixed()
    for _ in range(2):
        tokens = generate(model, prompt(*LENGTHS), cache, disable_compile=True)
        assert torch.equal(tokens, eager_tokens("full", *LENGTHS))
        cache.reset()
    with pytest.raises(CacheStateError, match=r"holds 3 rows: got a batch of 1; free\(\)"):
        generate(model, prompt(9), cache, disable_compile=True)
    cache.free()
    assert torch.equal(generate(model, prompt(9), cache, disable_compile=True), eager_tokens("full", 9))


def test_tokens_past_the_capacity_are_refused_and_the_rest_is_kept() -> None:
    cache = PagedCache(max_tokens=ROW, compileable=True)  # one layer: no config
    keys, values = states(1, ROW)
    cache.update(keys[:, :, :60], values[:, :, :60], 0)
    with pytest.raises(OutOfBlocks, match=r"5 more tokens a row were asked for: got 60 of 64 used; raise max_tokens"):
        cache.update(*states(1, 5), 0)
    cache.update(keys[:, :, 60:], values[:, :, 60:], 0)
    with pytest.raises(OutOfBlocks):
        cache.update(*states(1, 1), 0)
    assert torch.equal(cache.layers[0].keys.clone(), keys)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    cache = PagedCache(max_tokens=32, compileable=True)
    with pytest.raises(OutOfBlocks, match=r"batch of 33 rows does not fit.*batch_size \* \(prompt tokens"):
        cache.update(*states(33, 2), 0)
    cache.update(*states(2, 2), 0)


@pytest.mark.parametrize("block_size", [16, 64])
def test_rows_times_prompt_and_new_tokens_are_enough(block_size: int) -> None:
    lengths = (38, 20, 9)
    cache = PagedCache(tiny_config("full"), max_tokens=3 * (38 + 12), compileable=True, block_size=block_size)
    tokens = generate(tiny_model(), prompt(*lengths), cache, disable_compile=True)
    assert torch.equal(tokens, eager_tokens("full", *lengths))
    cache.check_integrity()


def test_rows_change_places_by_copy() -> None:
    cache = fixed()
    keys, values = states(3, 20)
    for layer in range(2):
        cache.update(keys, values, layer)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[1].keys.clone(), keys[[2, 0, 0]])
    with pytest.raises(CacheStateError, match="keeps its batch size of 3: got 6 rows"):
        cache.batch_repeat_interleave(2)


def test_crop_then_append_stores_the_same() -> None:
    cache = PagedCache(max_tokens=ROW, compileable=True)  # one layer: no config
    keys, values = states(1, 40)
    cache.update(keys, values, 0)
    cache.crop(-15)
    new, _ = states(1, 7, seed=1)
    cache.update(new, new, 0)
    assert torch.equal(cache.layers[0].keys.clone(), torch.cat([keys[:, :, :25], new], dim=2))
    assert int(cache.get_seq_length()) == 32


def test_a_deepcopy_goes_its_own_way() -> None:
    cache = fixed(batch=1)
    keys, values = states(1, 20)
    for layer in range(2):
        cache.update(keys, values, layer)
    twin = copy.deepcopy(cache)
    for seed, each in ((1, twin), (2, cache)):
        for layer in range(2):
            each.update(*states(1, 9, seed=seed), layer)
    for seed, each in ((1, twin), (2, cache)):
        assert torch.equal(each.layers[0].keys.clone(), torch.cat([keys, states(1, 9, seed=seed)[0]], dim=2))
        assert each.stats().num_tokens == 29


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_call_that_cannot_fit_is_refused_before_the_first_token(options: dict[str, Any]) -> None:
    model, rows = tiny_model(), options.get("num_beams", 1)
    cache = PagedCache(tiny_config("full"), max_tokens=rows * 48, compileable=True)
    with pytest.raises(OutOfBlocks, match=r"may grow its rows to 49 tokens: got room for 48.*lower max_new_tokens"):
        generate(model, prompt(20), cache, max_new_tokens=30, disable_compile=True, **options)
    assert int(cache.get_seq_length()) == 0
    want = generate(tiny_model("full", "eager"), prompt(20), max_new_tokens=29, **options)
    assert torch.equal(generate(model, prompt(20), cache, max_new_tokens=29, disable_compile=True, **options), want)
    text = {"input_ids": want, "attention_mask": torch.ones_like(want)}
    with pytest.raises(OutOfBlocks, match="may grow its rows to"):
        generate(model, text, cache, max_new_tokens=5, disable_compile=True, **options)
