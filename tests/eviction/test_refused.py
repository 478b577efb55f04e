"""What a policy cannot go with is refused with one error, and the cache or model is as it was."""

import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DynamicCache,
    GPT2Config,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_kvopt import (
    CACHE_KEYWORD,
    CacheStateError,
    EvictionPolicy,
    KVOptError,
    PagedCache,
    PrefixStore,
    QuantizedPagedCache,
    SinkRecent,
    SinkRecentPeriodic,
    UnsupportedModel,
    enable,
    enabled,
    speculative,
)
from tests.eviction.reference import assert_same_tokens, dense_logits
from tests.helpers import generate, prompt, tiny_config, tiny_model, unpadded

POLICY = SinkRecent(4, 16)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SinkRecent(-1, 16), "sinks must be a number of tokens, 0 or more: got -1"),
        (lambda: SinkRecent(True, 16), "sinks must be a number of tokens, 0 or more: got True"),
        (lambda: SinkRecent(4.0, 16), "sinks must be a number of tokens, 0 or more: got 4.0"),
        (lambda: SinkRecent(4, 0), "recent must be a positive number of tokens"),
        (lambda: SinkRecent(4, "1q"), "unit 'q' is unknown"),
        (lambda: SinkRecentPeriodic(4, 16, 0), "every must be a positive number of tokens"),
        (lambda: PagedCache(policy=SinkRecent(4, 15)), "recent must be at least one block of 16 tokens: got 15"),
        (lambda: PagedCache(policy=SinkRecent(4, 31), block_size=32), "at least one block of 32 tokens: got 31"),
        (lambda: PagedCache(policy=SinkRecentPeriodic(4, 16, 31)), "every must be at least two blocks of 16 tokens"),
        (lambda: PagedCache(policy=POLICY, compileable=True, max_tokens=64), "got compileable=True and policy="),
    ],
)  # fmt: skip
def test_numbers_that_cannot_work(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


def test_something_else_than_a_policy():
    with pytest.raises(TypeError, match="policy must be an eviction policy"):
        PagedCache(policy="sink_recent")
    with pytest.raises(TypeError, match="policy must be an eviction policy"):
        QuantizedPagedCache(policy=SinkRecent)


def test_numbers_are_written_as_everywhere():
    assert SinkRecent(4, "1k") == SinkRecent(4, 1024)
    assert SinkRecentPeriodic(recent="1k", every="512").every == 512


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(), "got SinkRecent(sinks=4, recent=16) for the encoder-decoder T5Config"),
        (BambaConfig(num_hidden_layers=2, attn_layer_indices=[1]), "layers that hold states"),
        (MistralConfig(num_hidden_layers=2, sliding_window=20), "has none, so that its windows bound the memory"),
    ],
    ids=["encoder-decoder", "recurrent", "windows alone"],
)
def test_models_that_keep_more_than_keys_and_values(config, said):
    with pytest.raises(UnsupportedModel, match=re.escape(said)):
        PagedCache(config, policy=POLICY)
    PagedCache(config)


def test_enable_refuses_before_anything_changes():
    model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=50))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        enable(model, policy=POLICY)
    assert enabled(model) is None
    model = tiny_model()
    for options in ({"prefix_sharing": True}, {"prefix_sharing": PrefixStore(model)}, {"draft": "prompt_lookup"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} needs all tokens"):
            enable(model, policy=POLICY, **options)
    with pytest.raises(UnsupportedModel, match="alone knows where its gaps are"):
        enable(model, policy=POLICY, attention=False)
    with pytest.raises(TypeError, match="policy must be"):
        enable(model, policy=4)
    assert enabled(model) is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_is_refused_at_the_first_forward(attention):
    model = tiny_model(attention=attention)
    cache = PagedCache(model.config, policy=POLICY)
    with pytest.raises(UnsupportedModel, match="have gaps that only hf_kvopt's attention knows"):
        generate(model, prompt(40), cache)
    cache.check_integrity()
    out = generate(tiny_model(), prompt(40), cache, max_new_tokens=60)
    assert_same_tokens(tiny_model(attention="eager"), out[0], 40, POLICY)


def test_keys_may_be_looked_at():
    model = tiny_model()
    cache = PagedCache(model.config, policy=POLICY)
    generate(model, prompt(60), cache, max_new_tokens=5)
    held = cache.layers[0].keys
    assert held.shape[2] == cache.stats().num_tokens < 60
    assert held.clone().isfinite().all()


def test_drafts_are_refused():
    model, inputs = tiny_model(), prompt(40)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model("full", seed=1)}):
        cache = PagedCache(model.config, policy=POLICY)
        with pytest.raises(CacheStateError, match="drafts are read several tokens at a time"):
            generate(model, inputs, cache, **options)
    cache = PagedCache(model.config, policy=POLICY)
    with pytest.raises(CacheStateError, match="drafts are read several tokens at a time"):
        generate(model, inputs, cache, custom_generate=speculative("prompt_lookup"))
    cache.check_integrity()
    cache.reset()
    assert cache.stats().used_blocks == 0


def test_rows_are_not_cut_one_by_one():
    cache = PagedCache(tiny_config("full"), policy=POLICY)
    for call in (lambda: cache.crop_rows([1]), lambda: cache.keep_paths(1, [[0]])):
        with pytest.raises(CacheStateError, match="cuts rows of drafts"):
            call()


def test_crop_is_as_if_the_tokens_never_came_or_refused():
    model, eager = tiny_model(), tiny_model(attention="eager")
    cache = PagedCache(model.config, policy=POLICY)
    text = generate(model, prompt(60), cache, max_new_tokens=50)  # 109 columns, of which 32 to 79 are gone
    with pytest.raises(CacheStateError, match=r"dropped its tokens 16 to 79"):
        cache.crop(-30)
    assert cache.get_seq_length() == 109
    with pytest.raises(CacheStateError, match="cannot crop row 0 to 79 tokens"):
        cache.crop(-30)
    cache.crop(-9)
    text = text[:, :101]
    text[0, -1] = 50
    out = generate(model, unpadded(text), cache, max_new_tokens=30)
    forwards = [0, *range(60, out.shape[1] + 1)]
    logits = dense_logits(eager, out[0], POLICY, forwards)
    assert torch.equal(logits[100:-1].argmax(-1), out[0, 101:])
    cache.check_integrity()


def test_masks_that_hide_more_than_padding_on_the_left():
    model, inputs = tiny_model(), prompt(60)
    for name, mask in (("right", [1] * 55 + [0] * 5), ("middle", [1] * 20 + [0] * 5 + [1] * 35)):
        cache = PagedCache(model.config, policy=POLICY)
        wrong = {"input_ids": inputs["input_ids"], "attention_mask": torch.tensor([mask])}
        with pytest.raises(CacheStateError, match="zeros behind a token"):
            generate(model, wrong, cache)
        assert cache.get_seq_length() == 0, name
        cache.check_integrity()


def test_a_mask_made_by_hand_is_taken_until_something_is_dropped():
    model = tiny_model()
    cache = PagedCache(model.config, policy=POLICY)
    ids = prompt(60)["input_ids"]
    mask = torch.ones(60, 60, dtype=torch.bool).tril()
    mask[:, :7] = False
    mask[range(7), range(7)] = True
    positions = (torch.arange(60) - 7).clamp(min=0)[None]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask[None, None], position_ids=positions, **{CACHE_KEYWORD: cache})
        kv_len, offset = cache.get_mask_sizes(1, 0)
        assert (kv_len, offset) == (60 - 7 - 16 + 1, 7 + 16)  # the mask's own padding goes, and a block
        by_hand = torch.ones(1, 1, 1, kv_len, dtype=torch.bool)
        with pytest.raises(CacheStateError, match="a mask made by hand speaks of columns of the text"):
            model(input_ids=ids[:, :1], attention_mask=by_hand, **{CACHE_KEYWORD: cache})
    assert cache.get_seq_length() == 60
    cache.check_integrity()


def test_a_window_that_only_the_mask_keeps():
    model = tiny_model("sliding")
    cache = PagedCache(policy=POLICY)  # without the config it keeps the whole text of a sliding layer
    with pytest.raises(KVOptError, match=r"give the cache its config|PagedCache\(config=model.config\)"):
        generate(model, prompt(40), cache)
    cache.check_integrity()


def test_a_policy_of_ones_own_never_loses_the_last_token():
    class Everything(EvictionPolicy):
        def after_step(self, length):
            return [range(length)]

    model = tiny_model()
    cache = PagedCache(model.config, policy=Everything())
    with torch.no_grad():
        model(input_ids=prompt(64)["input_ids"], **{CACHE_KEYWORD: cache})
        assert cache.get_mask_sizes(1, 0) == (16 + 1, 48)
        for step in range(1, 60):
            model(input_ids=prompt(1)["input_ids"], **{CACHE_KEYWORD: cache})
            assert cache.stats().num_tokens + cache.stats().evicted == 64 + step
            assert 16 <= cache.stats().num_tokens <= 32
    cache.check_integrity()


def test_positions_that_a_model_has_learned_end_where_they_end():
    """Nothing is moved: a model with a table of positions stops at its end, as with any other cache."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=48)
    ids = torch.ones(1, 49, dtype=torch.long)
    for cache in (PagedCache(config, policy=POLICY), DynamicCache(config=config)):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="hf_kvopt").eval()
        with torch.no_grad():
            model(input_ids=ids[:, :40], **{CACHE_KEYWORD: cache})
            with pytest.raises(IndexError):
                model(input_ids=ids[:, 40:], **{CACHE_KEYWORD: cache})
