"""Heads that keep all beside heads that stream: tokens are those of eager attention with the mask of each head."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig

from hf_kvopt import (
    CACHE_KEYWORD,
    CacheStateError,
    DuoAttention,
    PagedCache,
    QuantizedPagedCache,
    UnsupportedModel,
    disable,
    enable,
    retrieval_heads,
)
from tests.eviction.reference import seen_mask
from tests.eviction.test_models import _SHAPE, make
from tests.helpers import generate, prompt, tiny_config, tiny_model, unpadded

STEPS = 50
ONE = DuoAttention([[0], [1]], sinks=4, recent=16)
CASES = {
    "one head a layer": ONE,
    "none in the first layer": DuoAttention([[], [1]], 4, 32),
    "all in the first layer": DuoAttention([[0, 1], [0]], 4, 16),
    "no whole head": DuoAttention([[], []], 4, 16),
    "all whole": DuoAttention([[0, 1], [0, 1]], 4, 16),
}


def reference_logits(model, text, policy, forwards):
    """[tokens, vocab] of an eager model whose layers see by a mask of their own for each query head."""
    streaming, length = seen_mask(policy._others, forwards), len(text)
    causal = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    hooks = []
    for layer, heads in zip(model.model.layers, policy.heads, strict=True):
        # 4 query heads over 2 KV heads
        mask = torch.cat([causal if head // 2 in heads else streaming for head in range(4)], dim=1)

        def give(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=text[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def assert_tokens(text, num_prompt, policy, forwards=None):
    forwards = [0, *range(num_prompt, len(text) + 1)] if forwards is None else forwards
    logits = reference_logits(tiny_model(attention="eager"), text, policy, forwards)
    assert torch.equal(logits[num_prompt - 1 : -1].argmax(-1), text[num_prompt:])


@pytest.mark.parametrize("policy", CASES.values(), ids=CASES)
@pytest.mark.parametrize("lengths", [(70,), (70, 41)], ids=str)
def test_tokens_are_those_of_a_mask_for_each_head(policy, lengths):
    model, inputs = tiny_model(), prompt(*lengths)
    cache = PagedCache(model.config, policy=policy)
    out = generate(model, inputs, cache, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        assert_tokens(out[row, max(lengths) - length :], length, policy)
    assert cache.get_seq_length() == max(lengths) + STEPS - 1
    assert (cache.stats().evicted > 0) == any(len(heads) < 2 for heads in policy.heads)
    cache.check_integrity()


@pytest.mark.parametrize("chunk", [16, 25])
def test_a_prompt_in_chunks_and_a_further_turn(chunk):
    model, cache = tiny_model(), PagedCache(tiny_config("full"), policy=ONE)
    out = generate(model, unpadded(prompt(90)["input_ids"]), cache, max_new_tokens=20, prefill_chunk_size=chunk)
    assert_tokens(out[0], 90, ONE, [*range(0, 90, chunk), *range(90, 111)])
    text = torch.cat([out, prompt(7, seed=4)["input_ids"]], dim=1)
    again = generate(model, unpadded(text), cache, max_new_tokens=20)
    assert_tokens(again[0], 117, ONE, [*range(0, 90, chunk), *range(90, 110), *range(117, 138)])


@pytest.mark.parametrize("kind", ["paged", "int8", "fp8_e4m3", "int4", "k8v4"])
def test_every_format_and_rows_that_do_not_depend_on_their_batch(kind):
    inputs, model = prompt(200, 141), enable(tiny_model("mixed"), cache=kind, policy=DuoAttention([[1]], 4, 64))
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
    cache = out.get(CACHE_KEYWORD)
    cache.check_integrity()
    if kind != "k8v4" and kind != "int4":  # whose blocks are longer than what is dropped here
        assert cache.stats().evicted > 0
    for row, length in enumerate((200, 141)):
        own = unpadded(inputs["input_ids"][row : row + 1, 200 - length :])
        alone = model.generate(**own, max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(alone[0], out.sequences[row, 200 - length :])
    disable(model)


@pytest.mark.parametrize("kind", ["native", "int8"])
def test_memory_is_that_of_the_whole_heads_and_what_streams(kind):
    model, policy = tiny_model(), DuoAttention([[0], [1]], 64, 128)
    used = []
    for given in (None, policy):
        make_cache = PagedCache if kind == "native" else lambda *a, **k: QuantizedPagedCache(*a, format=kind, **k)
        cache = make_cache(model.config, policy=given)
        generate(model, prompt(4000), cache, max_new_tokens=2)
        used.append(cache.stats())
    share = 0.5 + 0.5 * 192 / 4000
    assert used[1].used_bytes == pytest.approx(used[0].used_bytes * share, rel=0.05)
    assert used[1].reserved_bytes < 0.75 * used[0].reserved_bytes


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {"repetition_penalty": 1.5}], ids=str
)
def test_beams_and_samples_are_those_of_each_row_alone(options):
    model, inputs = tiny_model(), prompt(50, 33)
    cache = PagedCache(model.config, policy=ONE)
    torch.manual_seed(1)
    out = generate(model, inputs, cache, max_new_tokens=30, **options)
    cache.check_integrity()
    for row, length in enumerate((50, 33)) if "do_sample" not in options else ():
        own = unpadded(inputs["input_ids"][row : row + 1, 50 - length :])
        alone = generate(model, own, PagedCache(model.config, policy=ONE), max_new_tokens=30, **options)
        assert torch.equal(alone[0], out[row, 50 - length :])


def test_a_fork_a_crop_and_a_cache_that_was_freed_go_on():
    model = tiny_model()
    cache = PagedCache(model.config, policy=ONE)
    text = generate(model, prompt(60), cache, max_new_tokens=40)
    twin = copy.deepcopy(cache)
    one, other = (generate(model, unpadded(text), each, max_new_tokens=35) for each in (cache, twin))
    assert torch.equal(one, other)
    with pytest.raises(CacheStateError, match="dropped its tokens"):
        cache.crop(-60)
    cache.crop(-3)
    again = generate(model, unpadded(one[:, : cache.get_seq_length() + 1]), cache, max_new_tokens=3)
    assert torch.equal(again, one[:, : again.shape[1]])
    twin.check_integrity()
    cache.free()
    assert torch.equal(generate(model, prompt(60), cache, max_new_tokens=40), text)
    cache.check_integrity()
    cache.reset()
    assert cache.stats().used_blocks == 0


def test_a_forward_that_breaks_off_leaves_both_kinds_of_heads_as_they_were(monkeypatch):
    model = tiny_model()
    cache = PagedCache(model.config, policy=ONE)
    text = generate(model, prompt(60), cache, max_new_tokens=20)
    want = generate(model, unpadded(text), copy.deepcopy(cache), max_new_tokens=20)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.model.layers[-1], "forward", _fail)
        with pytest.raises(RuntimeError, match="no power"):
            model(input_ids=text[:, -1:], **{CACHE_KEYWORD: cache})
    with pytest.raises(CacheStateError, match="stopped half way"), torch.no_grad():
        model(input_ids=text[:, -1:], **{CACHE_KEYWORD: cache})
    assert torch.equal(generate(model, unpadded(text), cache, max_new_tokens=20), want)
    cache.check_integrity()


def test_sinks_of_the_model_go_with_their_heads():
    config = GptOssConfig(**_SHAPE, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    whole, model = PagedCache(config), make(config, "hf_kvopt")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    cache = PagedCache(config, policy=DuoAttention([[1], [0]], 4, 64))
    want, got = (generate(model, prompt(50, 31), each, max_new_tokens=12) for each in (whole, cache))
    assert torch.equal(got, want)  # nothing is dropped yet: what differs is the order of heads alone


def test_another_attention_and_keys_that_are_looked_at():
    cache = PagedCache(tiny_config("full"), policy=ONE)
    with pytest.raises(UnsupportedModel, match="have gaps that only hf_kvopt's attention knows"):
        generate(tiny_model(attention="sdpa"), prompt(40), cache)
    cache.check_integrity()
    generate(tiny_model(), prompt(40), cache, max_new_tokens=30)
    keys = cache.layers[0].keys
    assert keys.shape == (1, 2, 69, 8)
    assert [part.shape[2] for part in keys.parts] == [69, cache.layers[0].others.keys.shape[2]]
    assert keys.parts[1].clone().isfinite().all()
    with pytest.raises(UnsupportedModel, match="have no dense form"):
        keys.clone()


@pytest.mark.parametrize(
    ("make_it", "error", "said"),
    [
        (lambda: DuoAttention("0"), TypeError, "heads must say for each layer"),
        (lambda: DuoAttention(3), TypeError, "heads must say for each layer"),
        (lambda: DuoAttention([0, 1]), TypeError, "heads of a layer must be a list of numbers"),
        (lambda: DuoAttention([[True]]), TypeError, "heads of a layer must be a list of numbers"),
        (lambda: DuoAttention([[1, 1]]), ValueError, "must be named once"),
        (lambda: DuoAttention([[-1]]), ValueError, "must be named once"),
        (lambda: DuoAttention([[0]], sinks=-1), ValueError, "sinks must be a number of tokens"),
        (lambda: DuoAttention([[0]], recent=0), ValueError, "recent must be a positive number"),
        (lambda: PagedCache(tiny_config("full"), policy=DuoAttention([[0]])), ValueError, "each of the 2 layers"),
        (lambda: PagedCache(policy=ONE), ValueError, "budget of its own"),
        (lambda: PagedCache(tiny_config("full"), policy=DuoAttention([[0], []], 4, 15)), ValueError, "at least one"),
    ],
)
def test_what_cannot_work(make_it, error, said):
    with pytest.raises(error, match=said):
        make_it()


def test_heads_that_a_layer_does_not_have_and_latents():
    model = tiny_model()
    cache = PagedCache(model.config, policy=DuoAttention([[0], [2]], 4, 16))
    with pytest.raises(UnsupportedModel, match=r"whole heads \[2\] of a layer: got a layer of 2 KV heads"):
        generate(model, prompt(40), cache)
    assert cache.get_seq_length() == 0
    cache.check_integrity()
    config = DeepseekV3Config(num_hidden_layers=1, kv_lora_rank=16)
    with pytest.raises(UnsupportedModel, match="share one latent"):
        PagedCache(config, policy=DuoAttention([[0]]))


def test_heads_that_look_far_back_are_found():
    model = tiny_model(attention="eager")
    heads = [retrieval_heads(model, share=share) for share in (0, 0.25, 0.5, 1)]
    assert [sum(map(len, one)) for one in heads] == [0, 1, 2, 4]
    assert heads[-1] == [[0, 1], [0, 1]]
    assert model.config._attn_implementation == "eager"
    out = generate(tiny_model(), prompt(60), PagedCache(model.config, policy=DuoAttention(heads[2], 4, 16)))
    assert_tokens(out[0], 60, DuoAttention(heads[2], 4, 16))
    assert retrieval_heads(model, torch.arange(3, 90).repeat(2), share=0.5) == retrieval_heads(
        model, torch.arange(3, 90).repeat(2)[None], share=0.5
    )
    for wrong in ({"share": 1.5}, {"share": True}, {"input_ids": [5] * 127}):
        with pytest.raises(ValueError, match=r"share must be|must have 128 tokens"):
            retrieval_heads(model, **wrong)
    assert [len(own) for own in retrieval_heads(tiny_model("mixed"), share=1)] == [2]


def _fail(*args, **kwargs):
    raise RuntimeError("no power")
