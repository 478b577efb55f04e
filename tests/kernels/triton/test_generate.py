"""Whole `generate()` calls whose cache and attention both run through the Triton kernels."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import hf_kvopt
from hf_kvopt.kernels.triton import attention, cascade
from hf_kvopt.kernels.triton.optional import INTERPRET

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "grouped queries": (LlamaForCausalLM, LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=32)),
    "one kv head": (LlamaForCausalLM, LlamaConfig(**SHAPE, num_key_value_heads=1, head_dim=40)),
    "sliding": (MistralForCausalLM, MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=32, sliding_window=10)),
}


def without_pads(config):
    """A cache whose second row begins at the fourth column."""
    cache = hf_kvopt.PagedCache(config)
    for table in cache._tables.values():
        table.adopt([[], []], [0, 3], 0)
    return cache


CACHES = {
    "growing": lambda config: hf_kvopt.PagedCache(config),
    "rows that begin at unlike columns": without_pads,
    "fixed": lambda config: hf_kvopt.PagedCache(config, max_tokens=64, compileable=True),
}


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(("model_class", "config"), MODELS.values(), ids=MODELS)
def test_padded_batches_generate_the_eager_tokens_over_blocks(model_class, config, make_cache):
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (2, 14))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    want = model.generate(ids, **options)
    model.set_attn_implementation("hf_kvopt")
    cache = make_cache(config)
    got = model.generate(ids, **{hf_kvopt.CACHE_KEYWORD: cache}, **options)
    assert INTERPRET
    assert torch.equal(got, want)
    assert cache.stats().dense_fallbacks == 0


def test_a_second_prompt_behind_the_first_reads_its_blocks():
    torch.manual_seed(0)
    model_class, config = MODELS["grouped queries"]
    model = model_class(config).eval()
    ids = torch.randint(3, 97, (1, 40))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(ids).logits
        model.set_attn_implementation("hf_kvopt")
        cache = hf_kvopt.PagedCache(config)
        got = torch.cat(
            [model(part, **{hf_kvopt.CACHE_KEYWORD: cache}).logits for part in ids.split([17, 20, 3], dim=1)], dim=1
        )
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("padding", [0, 3], ids="{} padding tokens".format)
def test_beams_read_their_prompt_together(monkeypatch, padding):
    monkeypatch.setattr(attention, "_MIN_SAVED_BYTES", 0)
    runs = []
    plan_cascade = cascade.plan_cascade
    monkeypatch.setattr(
        cascade, "plan_cascade", lambda q, kv, *rest: runs.append(kv.shared.tolist()) or plan_cascade(q, kv, *rest)
    )
    torch.manual_seed(0)
    model_class, config = MODELS["grouped queries"]
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (2, 70))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    model.set_attn_implementation("eager")
    want = model.generate(ids, **options)
    model.set_attn_implementation("hf_kvopt")
    got = model.generate(ids, **{hf_kvopt.CACHE_KEYWORD: hf_kvopt.PagedCache(config)}, **options)
    assert torch.equal(got, want)
    assert [64, 64] in runs
