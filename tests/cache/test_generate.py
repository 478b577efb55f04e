"""generate() with a PagedCache in every mode of decoding: the tokens of eager attention, block for block."""

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import hf_kvopt
from hf_kvopt import CacheStats, PagedCache
from tests.helpers import KINDS, eager_tokens, generate, prompt, tiny_model


def new_cache(kind: str, **options: Any) -> PagedCache:
    return PagedCache(config=tiny_model(kind).config, **options)


class Watch(StoppingCriteria):
    """Looks at a cache after every step and never stops."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.seen: list[CacheStats] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.cache.check_integrity()
        self.seen.append(self.cache.stats())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["hf_kvopt", "eager", "sdpa"])
@pytest.mark.parametrize("lengths", [(1,), (16,), (17, 33, 5)], ids=["one token", "one block", "padded batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_eager(kind: str, lengths: tuple[int, ...], attention: str) -> None:
    cache = new_cache(kind)
    tokens = generate(tiny_model(kind, attention), prompt(*lengths), cache)
    assert torch.equal(tokens, eager_tokens(kind, *lengths))
    cache.check_integrity()


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_cache_without_the_config_is_right_as_well(kind: str) -> None:
    assert torch.equal(generate(tiny_model(kind), prompt(17, 33, 5), PagedCache()), eager_tokens(kind, 17, 33, 5))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_beams_share_blocks_and_find_what_eager_finds(kind: str) -> None:
    options = {"num_beams": 3, "max_new_tokens": 9, "num_return_sequences": 2}
    cache = new_cache(kind)
    watch = Watch(cache)
    tokens = generate(
        tiny_model(kind), prompt(37, 20), cache, **options, stopping_criteria=StoppingCriteriaList([watch])
    )
    assert torch.equal(tokens, eager_tokens(kind, 37, 20, **options))
    assert any(stats.shared_blocks > 0 for stats in watch.seen)
    cache.check_integrity()


def test_sequences_of_one_prompt_share_its_blocks_and_sample_as_eager_does() -> None:
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 9}
    cache = PagedCache()
    watch = Watch(cache)
    torch.manual_seed(5)
    reference = generate(tiny_model("full", "eager"), prompt(37), DynamicCache(), **options)
    torch.manual_seed(5)
    tokens = generate(tiny_model(), prompt(37), cache, **options, stopping_criteria=StoppingCriteriaList([watch]))
    assert torch.equal(tokens, reference)


def test_beams_hold_far_fewer_blocks_than_copies_would() -> None:
    cache = PagedCache()
    watch = Watch(cache)
    generate(tiny_model(), prompt(160), cache, num_beams=4, max_new_tokens=5,
             stopping_criteria=StoppingCriteriaList([watch]))  # fmt: skip
    assert watch.seen[-1].used_blocks < 2 * (165 // 16 + 1)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speculation", ["the model assists itself", "another model assists", "prompt lookup"])
def test_assisted_generation_gives_plain_greedy_tokens(kind: str, speculation: str) -> None:
    cache = new_cache(kind)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if speculation != "prompt lookup":
        options = {"assistant_model": tiny_model(kind, seed=int(speculation.startswith("another")))}
    tokens = generate(tiny_model(kind), prompt(37), cache, max_new_tokens=24, **options)
    assert torch.equal(tokens, eager_tokens(kind, 37, max_new_tokens=24))
    cache.check_integrity()


def test_layers_that_an_early_exit_leaves_out_get_no_cache() -> None:
    model = hf_kvopt.enable(tiny_model("mixed"))
    tokens = generate(model, prompt(37), assistant_early_exit=1)
    assert torch.equal(tokens, eager_tokens("mixed", 37))


def test_two_threads_with_a_cache_each_on_one_model_do_not_mix() -> None:
    model, results = tiny_model("mixed"), {}

    def work(lengths: tuple[int, ...]) -> None:
        results[lengths] = [generate(model, prompt(*lengths), new_cache("mixed")) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(lengths,)) for lengths in ((33, 20), (18, 5, 40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lengths in ((33, 20), (18, 5, 40)):
        assert len(results[lengths]) == 3
        assert all(torch.equal(tokens, eager_tokens("mixed", *lengths)) for tokens in results[lengths])


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)],
                         ids=["inference then no_grad", "no_grad then inference"])  # fmt: skip
def test_inference_mode_and_no_grad_may_be_mixed_on_one_cache(modes: tuple[Any, Any]) -> None:
    model, inputs, cache = tiny_model(), prompt(33), PagedCache()
    ids = inputs["input_ids"]
    with modes[0]():
        first = model(ids[:, :20], **{hf_kvopt.CACHE_KEYWORD: cache}).logits[:, -1].clone()
    with modes[1]():
        second = model(ids[:, 20:], **{hf_kvopt.CACHE_KEYWORD: cache}).logits[:, -1].clone()
    with torch.no_grad():
        reference = tiny_model("full", "eager")(ids).logits
    assert torch.allclose(first, reference[:, 19], atol=1e-4)
    assert torch.allclose(second, reference[:, -1], atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_fed_in_chunks_continues_the_same(kind: str) -> None:
    model, inputs, cache = tiny_model(kind), prompt(50), new_cache(kind)
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 31), (31, 49)):
            model(inputs["input_ids"][:, start:stop], **{hf_kvopt.CACHE_KEYWORD: cache})
    assert torch.equal(generate(model, inputs, cache), eager_tokens(kind, 50))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_of_a_chat_continues_on_the_first(kind: str) -> None:
    model, cache = tiny_model(kind), new_cache(kind)
    first = generate(model, prompt(30), cache)
    longer = torch.cat([first, prompt(11, seed=3)["input_ids"]], dim=1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    reference = generate(tiny_model(kind, "eager"), inputs, DynamicCache(config=model.config))
    assert torch.equal(generate(model, inputs, cache), reference)


@pytest.mark.parametrize("kind", KINDS)
def test_cropped_tokens_can_be_generated_again(kind: str) -> None:
    model, inputs, cache = tiny_model(kind), prompt(15), new_cache(kind)
    with torch.no_grad():
        model(inputs["input_ids"], **{hf_kvopt.CACHE_KEYWORD: cache})
    cache.activate_past_recording()
    for removed in (1, 4, 9):
        with torch.no_grad():
            model(prompt(removed - 1 + 20, seed=removed)["input_ids"], **{hf_kvopt.CACHE_KEYWORD: cache})
        cache.crop(-(removed - 1 + 20))
        cache.check_integrity()
    cache.crop(-1)
    assert torch.equal(generate(model, inputs, cache), eager_tokens(kind, 15))


def test_a_sliding_model_holds_no_more_after_many_tokens_than_after_few() -> None:
    cache = new_cache("sliding")
    watch = Watch(cache)
    generate(tiny_model("sliding"), prompt(40), cache, max_new_tokens=150,
             stopping_criteria=StoppingCriteriaList([watch]))  # fmt: skip
    assert max(stats.used_blocks for stats in watch.seen) <= 4
    assert watch.seen[-1].reserved_bytes == watch.seen[20].reserved_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_serves_again_after_free_reset_and_the_context_manager(kind: str) -> None:
    model = tiny_model(kind)
    with new_cache(kind) as cache:
        for forget in (cache.free, cache.reset, cache.free, cache.reset):
            assert torch.equal(generate(model, prompt(17, 33, 5), cache), eager_tokens(kind, 17, 33, 5))
            forget()
            assert torch.equal(generate(model, prompt(9), cache), eager_tokens(kind, 9))
            forget()
        generate(model, prompt(9), cache)
    stats = cache.stats()
    assert (stats.num_blocks, stats.reserved_bytes, cache.get_seq_length()) == (0, 0, 0)
    assert torch.equal(generate(model, prompt(9), cache), eager_tokens(kind, 9))


def test_a_freed_cache_may_go_to_another_model() -> None:
    cache = PagedCache()
    generate(tiny_model("full"), prompt(9), cache)
    cache.free()
    assert torch.equal(generate(tiny_model("sliding"), prompt(9), cache), eager_tokens("sliding", 9))
