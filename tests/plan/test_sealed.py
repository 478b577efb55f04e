"""Bytes of caches that seal their blocks, tail included, are those of live ones."""

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig

from hf_kvopt import CACHE_KEYWORD, QuantizedPagedCache
from hf_kvopt.plan.memory import memory
from tests.cache.sealed import FORMATS
from tests.helpers import generate, prompt, tiny_model


@pytest.mark.parametrize("name", FORMATS[:2])
@pytest.mark.parametrize("kind", ["full", "mixed"])
@pytest.mark.parametrize(
    ("batch", "first", "length"), [(1, 5, 5), (1, 30, 70), (3, 100, 100), (2, 100, 131), (1, 200, 201)]
)
def test_predicted_bytes_are_those_of_the_live_cache(kind, name, batch, first, length):
    model, text = tiny_model(kind), prompt(*[length] * batch)["input_ids"]
    options = {"format": name, "block_size": 16, "skip_layers": ()}
    cache = QuantizedPagedCache(model.config, **options)
    with torch.no_grad():
        for start, stop in [(0, first), *((i, i + 1) for i in range(first, length))]:
            model(text[:, start:stop], **{CACHE_KEYWORD: cache})
    got = memory(model, context=length, prompt=first, batch=batch, dtype="float32", weights=False, **options)
    live = cache.stats()
    assert (got.used_bytes, got.reserved_bytes) == (live.used_bytes, live.reserved_bytes)


def test_blocks_of_64_are_chosen_where_they_are_sealed():
    model = tiny_model("full")
    assert memory(model, context=1000, format="int3", weights=False).block_size == 64
    assert memory(model, context=1000, format="int8", weights=False).block_size == 16
    assert QuantizedPagedCache(model.config, format="int3").cache_config.block_size == 64


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {}),
        ("mixed", {}),
        ("sliding", {}),
        ("mixed", {"skip_layers": ()}),
        ("full", {"layer_formats": {1: "int8"}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["int4", "k8v4"])
def test_fixed_capacity_holds_what_arithmetic_says(name, kind, options, batch):
    model, fixed = tiny_model(kind), {"max_tokens": batch * 200, "compileable": True}
    cache = QuantizedPagedCache(model.config, format=name, **options, **fixed)
    generate(model, prompt(*[70] * batch), cache, disable_compile=True, max_new_tokens=3)
    told = memory(
        model, context=72, prompt=70, batch=batch, format=name, dtype="float32", weights=False, **options, **fixed
    )
    assert (cache.stats().reserved_bytes, cache.stats().used_bytes) == (told.reserved_bytes, told.used_bytes)


def test_latents_are_refused_alike_by_the_cache_and_by_arithmetic():
    config = DeepseekV3Config(num_hidden_layers=2)
    for make in (
        lambda: QuantizedPagedCache(config, format="int4"),
        lambda: memory(config, context=64, format="int4", weights=False),
    ):
        with pytest.raises(ValueError, match="latent attention stores each token by itself: got format 'int4'"):
            make()


@pytest.mark.parametrize(("name", "share"), [("k8v4", 0.41), ("int4", 0.30), ("k4v2", 0.24), ("int3", 0.22)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes_of_a_long_text_keep_their_share_of_bfloat16_with_all_that_is_exact(name, share, head_dim):
    config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=3, num_attention_heads=9, hidden_size=9 * head_dim)
    question = {"context": "32k", "dtype": "bfloat16", "weights": False}
    native, own = (memory(config, format=form, **question).used_bytes for form in ("native", name))
    assert own <= share * native
