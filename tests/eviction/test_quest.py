"""Blocks that are selected by bounds of their keys: equal to all where the budget covers all, else to a plain mask."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DynamicCache

from hf_kvopt import CACHE_KEYWORD, KVOptError, PagedCache, Quest, UnsupportedModel, disable, enable
from tests.eviction.test_models import make
from tests.helpers import generate, prompt, tiny_model, unpadded

SIZE = 16


def bounded_attention(monkeypatch, tokens, whole_layers=0):
    """Let eager attention of single queries see only the blocks that the bounds choose, by keys as plain tensors."""
    from transformers.models.llama import modeling_llama

    def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        length, kv_heads = key.shape[2], key.shape[1]
        hidden = torch.full((query.shape[0], query.shape[1], query.shape[2], length), 0.0)
        if query.shape[2] == 1 and length > tokens and module.layer_idx >= whole_layers:
            hidden -= torch.inf
            parts = key[0].split(SIZE, dim=1)
            for head in range(kv_heads):
                bounds = []
                for part in parts:
                    low, high = part[head].min(0).values, part[head].max(0).values
                    bounds.append(
                        [torch.maximum(q * low, q * high).sum() for q in query[0, head * 2 : head * 2 + 2, 0]]
                    )
                weights = (torch.tensor(bounds).T * scaling).softmax(-1).sum(0)
                weights[-1] = 9
                for block in weights.argsort(descending=True)[: tokens // SIZE].tolist():
                    hidden[0, head * 2 : head * 2 + 2, :, block * SIZE : (block + 1) * SIZE] = 0
        k, v = (x.repeat_interleave(2, dim=1) for x in (key, value))
        scores = query @ k.mT * scaling + hidden
        if query.shape[2] > 1:
            scores += torch.full(scores.shape[2:], -torch.inf).triu(1 + length - query.shape[2])
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)


@pytest.mark.parametrize(("tokens", "whole_layers"), [(32, 0), (48, 1), (64, 0)])
@pytest.mark.parametrize("length", [90, 64, 65])
def test_tokens_are_those_of_a_mask_over_the_blocks_of_highest_bounds(monkeypatch, tokens, whole_layers, length):
    model, eager, inputs = tiny_model(), tiny_model(attention="eager"), unpadded(prompt(length)["input_ids"])
    cache = PagedCache(model.config, policy=Quest(tokens, whole_layers))
    out = generate(model, inputs, cache, max_new_tokens=50)
    whole = generate(eager, inputs, DynamicCache(config=eager.config), max_new_tokens=50)
    bounded_attention(monkeypatch, tokens, whole_layers)
    want = generate(eager, inputs, DynamicCache(config=eager.config), max_new_tokens=50)
    assert torch.equal(out, want)
    if tokens == 32 and length == 90:
        assert not torch.equal(out, whole)
    assert cache.stats().evicted == 0
    cache.check_integrity()


@pytest.mark.parametrize("policy", [Quest(256, 0), Quest(32, 2)], ids=str)
def test_a_budget_that_covers_all_is_exact(policy):
    model, inputs = tiny_model(), prompt(90, 61, 7)
    out = generate(model, inputs, PagedCache(model.config, policy=policy), max_new_tokens=40)
    assert torch.equal(out, generate(model, inputs, PagedCache(model.config), max_new_tokens=40))


@pytest.mark.parametrize("kind", ["paged", "int8", "fp8_e4m3", "int8/int4", "int4/int4"])
def test_selecting_all_blocks_by_bounds_reads_what_attention_reads(kind, monkeypatch):
    """The gathered way gives what the usual one gives where the bounds leave nothing out, in unlike rows as well."""
    inputs = prompt(70, 41)
    outs = []
    for tokens in (4096, None):
        with monkeypatch.context() as patch:
            if tokens is not None:
                # All are read, but by way of the selection: one token less than are there is the budget asked for.
                patch.setattr("hf_kvopt.eviction.quest.Quest.read_tokens", lambda self, layer: _Endless(SIZE * 99))
            model = enable(tiny_model(), cache=kind, policy=Quest(4096, 0))
            outs.append(model.generate(**inputs, max_new_tokens=30, do_sample=False))
            disable(model)
    assert torch.equal(*outs)


class _Endless(int):
    """A budget that covers all blocks and still is not said to."""

    def __ge__(self, other):
        return False


@pytest.mark.parametrize("kind", ["paged", "int8"])
def test_beams_share_blocks_and_their_bounds(kind):
    inputs, model = prompt(90, 61), enable(tiny_model(), cache=kind, policy=Quest(32, 0))
    for options in ({}, {"num_beams": 3}):
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, **options)
        out.get(CACHE_KEYWORD).check_integrity()
    own = unpadded(inputs["input_ids"][:1])
    alone = model.generate(**own, max_new_tokens=40, do_sample=False, num_beams=3)
    assert torch.equal(alone[0], out.sequences[0])
    disable(model)


def test_a_fork_a_crop_and_blocks_that_are_used_again_have_bounds_of_their_own():
    model = tiny_model()
    cache = PagedCache(model.config, policy=Quest(32, 0))
    text = generate(model, prompt(60), cache, max_new_tokens=40)
    twin = copy.deepcopy(cache)
    one, other = (generate(model, unpadded(text), each, max_new_tokens=30) for each in (cache, twin))
    assert torch.equal(one, other)
    cache.crop(-40)
    again = generate(model, unpadded(one[:, :90]), cache, max_new_tokens=40)
    assert torch.equal(again, one)
    cache.reset()
    assert torch.equal(generate(model, prompt(60), cache, max_new_tokens=40), text)
    cache.check_integrity()


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: Quest(0), "tokens must be a positive number"),
        (lambda: Quest(64, -1), "whole_layers must be a number of layers"),
        (lambda: Quest(64, True), "whole_layers must be a number of layers"),
        (lambda: PagedCache(policy=Quest(31)), "at least two blocks of 16 tokens"),
    ],
)
def test_numbers_that_cannot_work(make_it, said):
    with pytest.raises(ValueError, match=said):
        make_it()


def test_sealed_formats_and_latents_are_refused():
    model = enable(tiny_model(), cache="int4", policy=Quest(256))
    with pytest.raises(UnsupportedModel, match="seals whole blocks"):
        model.generate(**prompt(40), max_new_tokens=3)
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(KVOptError, match="share one latent"):
        enable(make(config, "eager"), policy=Quest(64)).generate(**prompt(40), max_new_tokens=3)
