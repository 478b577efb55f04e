"""Bytes of caches that seal their blocks, tail included, are those of live ones."""

import pytest
import torch
from transformers import DeepseekV3Config

from hf_kvopt import CACHE_KEYWORD, QuantizedPagedCache
from hf_kvopt.plan.inputs import BadInput
from hf_kvopt.plan.memory import memory
from tests.cache.sealed import FORMATS
from tests.helpers import prompt, tiny_model


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


@pytest.mark.parametrize("options", [{"format": "int4"}, {"layer_formats": {1: "k8v4"}}], ids=str)
def test_fixed_capacity_is_refused_alike_by_the_cache_and_by_arithmetic(options):
    model, fixed = tiny_model("full"), {"max_tokens": 256, "compileable": True}
    name = options.get("format", "k8v4")
    said = (
        rf"a cache of fixed capacity \(compileable=True\) stores each token by itself: got format '{name}'.*'int4/int4'"
    )
    with pytest.raises(ValueError, match=said):
        QuantizedPagedCache(model.config, **options, **fixed)
    with pytest.raises(BadInput, match=said):
        memory(model, context=64, weights=False, **options, **fixed)


def test_latents_are_refused_alike_by_the_cache_and_by_arithmetic():
    config = DeepseekV3Config(num_hidden_layers=2)
    for make in (
        lambda: QuantizedPagedCache(config, format="int4"),
        lambda: memory(config, context=64, format="int4", weights=False),
    ):
        with pytest.raises(ValueError, match="latent attention stores each token by itself: got format 'int4'"):
            make()
