"""Budgets by layer: tokens of eager attention over what each layer keeps, and memory that is freed layer by layer."""

import copy

import pytest
import torch
from torch import nn

from hf_kvopt import CACHE_KEYWORD, PagedCache, PyramidKV, SnapKV, disable, enable
from tests.eviction.scoring import shrunk_tokens
from tests.eviction.test_scores import best, distinct
from tests.helpers import generate, prompt, tiny_config, tiny_model, unpadded

STEPS = 40
POLICY = PyramidKV(0.4, window=8, slope=4)


def by_layers(policy: PyramidKV, num_layers: int):
    """Choices of SnapKV by weights of eager attention, with the budget of each layer in turn."""
    turns = iter(range(num_layers))

    def choose(w, k, v):
        one, n = policy.at(next(turns), num_layers), k.shape[1]
        window, half = min(one.window, n), one.kernel // 2
        votes = nn.functional.pad(w[:, n - window :, : n - window].mean(1), (half, half))
        smooth = [votes[:, i : i + one.kernel].sum(1) / one.kernel for i in range(n - window)]
        scores = torch.stack([*smooth, *[torch.full((len(w),), 9.0)] * window], 1)
        return best(scores.view(len(k), len(w) // len(k), n).mean(1), one.budget(n))

    return choose


def without_masks_at_steps(model: nn.Module) -> nn.Module:
    """Let single tokens see all: transformers makes the mask of one layer for all."""

    def drop(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None} if kwargs["hidden_states"].shape[1] == 1 else kwargs

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    return model


@pytest.mark.parametrize("lengths", [(90,), (90, 61, 7), (64, 64), (90, 20)], ids=str)
def test_tokens_are_those_of_eager_attention_over_what_each_layer_keeps(lengths) -> None:
    model, eager, inputs = tiny_model(), without_masks_at_steps(tiny_model(attention="eager")), distinct(*lengths)
    cache = PagedCache(model.config, policy=POLICY)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        own = inputs["input_ids"][row : row + 1, max(lengths) - length :]
        want = shrunk_tokens(eager, own, STEPS, by_layers(POLICY, 2))
        assert torch.equal(out[row, max(lengths) - length :], want[0])
    cache.check_integrity()


def test_budgets_fall_from_layer_to_layer_and_their_mean_is_the_share() -> None:
    for length in (100, 1000, 5000):
        budgets = [PyramidKV(0.25, slope=20).at(i, 9).budget(length) for i in range(9)]
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[0] <= length
        assert sum(budgets) / 9 == pytest.approx(SnapKV(0.25).budget(length), abs=1)
    assert [PyramidKV(0.5).at(i, 3).budget(30) for i in range(3)] == [30, 30, 30]


def test_memory_is_that_of_what_is_kept_and_falls_by_layer() -> None:
    model = tiny_model()
    whole, part = PagedCache(model.config), PagedCache(model.config, policy=PyramidKV(0.25, window=16))
    for cache in (whole, part):
        generate(model, prompt(2000), cache, max_new_tokens=2)
    assert part.stats().used_bytes == pytest.approx(whole.stats().used_bytes / 4, rel=0.05)
    held = [layer.keys.shape[2] for layer in part.layers]
    assert held[0] > 10 * held[1] > 0


@pytest.mark.parametrize("kind", ["paged", "int8", "int4"])
def test_windows_and_formats_and_rows_alone(kind: str) -> None:
    inputs, model = prompt(90, 61), enable(tiny_model("mixed"), cache=kind, policy=POLICY)
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    for row, length in enumerate((90, 61)):
        own = unpadded(inputs["input_ids"][row : row + 1, 90 - length :])
        assert torch.equal(model.generate(**own, max_new_tokens=STEPS, do_sample=False)[0], out[row, 90 - length :])
    disable(model)


@torch.no_grad()
def test_forks_turns_and_a_cache_that_was_freed_go_on() -> None:
    model, inputs = tiny_model(), prompt(90, 61)
    cache = PagedCache(model.config, policy=POLICY)
    model(**inputs, **{CACHE_KEYWORD: cache})
    fork, step = copy.deepcopy(cache), torch.tensor([[5], [6]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    outputs = []
    for one in (cache, fork):
        first = model(step, attention_mask=mask[:, :91], **{CACHE_KEYWORD: one}).logits
        outputs.append([first, model(step.repeat(1, 3), attention_mask=mask, **{CACHE_KEYWORD: one}).logits])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    whole = PagedCache(model.config, policy=POLICY)
    model(**inputs, **{CACHE_KEYWORD: whole})
    model(step, attention_mask=mask[:, :91], **{CACHE_KEYWORD: whole})
    one_by_one = [
        model(step, attention_mask=mask[:, : 92 + i], **{CACHE_KEYWORD: whole}).logits[:, 0] for i in range(3)
    ]
    assert torch.allclose(torch.stack(one_by_one, 1), outputs[0][1], atol=1e-4)
    cache.free()
    again = generate(model, inputs, cache, max_new_tokens=9)
    assert torch.equal(again, generate(model, inputs, PagedCache(model.config, policy=POLICY), max_new_tokens=9))
    for one in (cache, fork, whole):
        one.check_integrity()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="slope must be a whole number"):
        PyramidKV(slope=0)
    with pytest.raises(ValueError, match=r"budget of its own: got a cache without the model's config"):
        PagedCache(policy=PyramidKV())
    assert PagedCache(tiny_config("full"), policy=PyramidKV()).policy == PyramidKV()
