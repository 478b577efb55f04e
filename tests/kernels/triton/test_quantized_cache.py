"""Quantized caches and attention end to end through the Triton kernels, for each format and every length of a block."""

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, QuantizedPagedCache
from hf_kvopt.kernels import devices
from hf_kvopt.kernels.reference.attention import attention_reference, visible_pairs
from hf_kvopt.kernels.triton.optional import INTERPRET
from hf_kvopt.quant import dequantize, get_kv_format, quantize
from tests.kernels.triton.conftest import assert_close

BLOCK, DIM, SCALE = 16, 32, 0.2
# Those that store each token by itself; test_sealed.py has the others.
FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2", "int4/int4", "int8/int4"]
HEADS = {"grouped queries": (4, 2), "one kv head": (3, 1)}
CACHES = {"growing": {}, "fixed": {"max_tokens": 64, "compileable": True}}


class Attention(torch.nn.Module):
    """What a model's attention module says of itself."""

    layer_idx, is_causal = 0, True

    def __init__(self, group):
        super().__init__()
        self.num_key_value_groups = group


def draw(num_heads, num_kv_heads, tokens, seed, shift=0.0):
    """Queries, keys with a shift on one channel, and values of one row."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, tokens, DIM, generator=generator) for n in (num_heads, num_kv_heads, num_kv_heads))
    k[..., 5] += shift
    return q, k, v


def reference(q, keys, values, softcap=None, sinks=None):
    seen = visible_pairs(q.shape[2], torch.full((1,), keys.shape[2]), keys.shape[2])
    return attention_reference(q, keys, values, seen, SCALE, softcap, sinks).out


def stored(states, fmt):
    return dequantize(*quantize(states, fmt), fmt)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_length_of_a_block_is_attended_to_as_stored(name, heads):
    attend, module = AttentionInterface()[ATTENTION_NAME], Attention(heads[0] // heads[1]).eval()
    formats = get_kv_format(name)
    assert INTERPRET
    cache = QuantizedPagedCache(format=name, guard="off")
    keys = values = torch.zeros(1, heads[1], 0, DIM)
    # A block, a decode step at each length of the next, and a chunk behind it.
    for seed, tokens in enumerate((BLOCK, *[1] * BLOCK, 3)):
        q, k, v = draw(*heads, tokens, seed)
        keys = torch.cat([keys, stored(k, formats.k)], dim=2)
        values = torch.cat([values, stored(v, formats.v)], dim=2)
        out, _ = attend(module, q, *cache.update(k, v, 0), None, scaling=SCALE)
        assert_close(out, reference(q, keys, values))


@pytest.mark.parametrize(
    ("name", "options", "fixed"),
    [
        ("int8", {}, False),
        ("int4/int4", {}, False),
        ("int4/int4", {}, True),
        ("int4/int4", {"softcap": 4.0}, False),
        ("int4/int4", {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}, False),
    ],
    ids=["int8", "int4", "int4 of fixed capacity", "int4 capped", "int4 with sinks"],
)
def test_guarded_keys_are_attended_to_as_what_they_stand_for(name, options, fixed):
    attend, module = AttentionInterface()[ATTENTION_NAME], Attention(2).eval()
    cache = QuantizedPagedCache(format=name, **({"max_tokens": 128, "compileable": True} if fixed else {}))
    held = 0
    for seed, tokens in enumerate((20, 1, 3)):
        q, k, v = draw(4, 2, tokens, seed, shift=40.0)
        handles = cache.update(k, v, 0)
        held += tokens
        mask = None
        if fixed:
            columns = torch.arange(handles[0].shape[2])
            mask = (columns <= held - tokens + torch.arange(tokens)[:, None])[None, None]
        out, _ = attend(module, q, *handles, mask, scaling=SCALE, **options)
        keys, values = (cache.layers[0].keys.clone(), cache.layers[0].values.clone())
        assert (keys[:, :, -tokens:] - k).abs().max() < 0.8
        want = reference(q, keys, values, options.get("softcap"), options.get("s_aux"))
        # Scores of 100 and more are summed in another order.
        assert (out - want).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "heads", "cache"),
    [
        *((name, "one kv head" if i % 2 else "grouped queries", "growing") for i, name in enumerate(FORMATS)),
        ("int4/int4", "grouped queries", "fixed"),
    ],
)
def test_a_whole_generation_is_the_text_of_the_cpu_path(name, heads, cache, monkeypatch):
    torch.manual_seed(0)
    num_heads, num_kv_heads = HEADS[heads]
    shape = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": DIM}
    # Weights drawn wide, so that what rounding differs by decides no token.
    config = LlamaConfig(
        **shape, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, initializer_range=0.25
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.disable_compile = True
    ids = torch.randint(3, 61, (1, BLOCK - 1))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "output_logits": True}
    texts, logits = [], []
    for interprets in (True, False):
        monkeypatch.setattr(devices, "INTERPRET", interprets)
        held = QuantizedPagedCache(config, format=name, **CACHES[cache])
        out = model.generate(ids, **{CACHE_KEYWORD: held}, return_dict_in_generate=True, **options)
        texts.append(out.sequences)
        logits.append(torch.stack(out.logits))
        assert held.stats().dense_fallbacks == 0
    assert texts[0].shape == (1, BLOCK + 2)
    assert torch.equal(*texts)
    assert 0 < (logits[0] - logits[1]).abs().max() < 1e-3 * logits[1].abs().max()
