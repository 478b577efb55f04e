"""Bytes that quantized caches take, which layers they quantize, whole generations, and what is refused."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

import hf_kvopt
from hf_kvopt import PagedCache, QuantizedPagedCache, UnsupportedDevice
from hf_kvopt.kernels import devices
from hf_kvopt.kernels.triton.launch import Target
from hf_kvopt.quant import get_kv_format
from tests.helpers import KINDS, NEW_TOKENS, eager_tokens, generate, prompt, states, tiny_config, tiny_model, unpadded

# Those that store each token by itself; test_sealed.py has the others.
FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2", "int4/int4", "int8/int4"]
BARS = {"int8": 0.53, "fp8_e4m3": 0.53, "fp8_e5m2": 0.53, "int4/int4": 0.30, "int8/int4": 0.41}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [64, 128])
def test_bytes_stay_below_their_share_of_bfloat16_with_scales_counted(name: str, dim: int) -> None:
    caches = PagedCache(), QuantizedPagedCache(format=name)
    keys, values = (x.bfloat16() for x in states(2, 2000, dim=dim))
    keys[..., 7] += 50  # so that centres are counted, too
    for cache in caches:
        for layer in range(2):
            cache.update(keys, values, layer)
    native, quantized = (cache.stats() for cache in caches)
    assert quantized.reserved_bytes <= BARS[name] * native.reserved_bytes
    assert quantized.used_bytes <= BARS[name] * native.used_bytes
    pools = [layer.pool for layer in caches[1].layers]
    held = sum(x.untyped_storage().nbytes() for pool in pools for plane in pool.planes for x in plane.tensors)
    assert held <= quantized.reserved_bytes <= 1.01 * held


@pytest.mark.parametrize("kind", KINDS)
def test_int8_generates_the_tokens_of_the_unquantized_cache(kind: str) -> None:
    model = tiny_model(kind)
    for options in ({}, {"exact_prefill": True}, {"skip_layers": ()}):
        cache = QuantizedPagedCache(model.config, format="int8", **options)
        assert torch.equal(generate(model, prompt(9, 21), cache), eager_tokens(kind, 9, 21))
        cache.check_integrity()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_growing_and_fixed_capacity_generate_alike_in_every_format(name: str, kind: str) -> None:
    model = tiny_model(kind)
    model.generation_config.disable_compile = True
    growing = QuantizedPagedCache(model.config, format=name)
    fixed = QuantizedPagedCache(model.config, format=name, max_tokens=256, compileable=True)
    assert torch.equal(generate(model, prompt(9, 21), growing), generate(model, prompt(9, 21), fixed))


@pytest.mark.parametrize("name", FORMATS)
def test_beams_are_those_of_plain_attention_over_the_same_storage(name: str) -> None:
    tokens = []
    for attention in ("hf_kvopt", "eager"):
        model = tiny_model("full", attention)
        cache = QuantizedPagedCache(model.config, format=name)
        tokens.append(generate(model, prompt(9, 6), cache, num_beams=3))
        cache.check_integrity()
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("speculation", ["another model assists", "prompt lookup"])
def test_assisted_generation_gives_the_tokens_of_plain_decoding_over_the_same_format(
    name: str, speculation: str
) -> None:
    model = tiny_model()
    options: dict[str, object] = {"prompt_lookup_num_tokens": 3}
    if speculation == "another model assists":
        options = {"assistant_model": tiny_model(seed=1)}
    plain, assisted = (QuantizedPagedCache(model.config, format=name) for _ in range(2))
    wanted = generate(model, prompt(37), plain, max_new_tokens=24)
    assert torch.equal(generate(model, prompt(37), assisted, max_new_tokens=24, **options), wanted)
    assisted.check_integrity()


@pytest.mark.parametrize("name", FORMATS)
def test_sampling_several_sequences_and_a_second_turn_work_in_every_format(name: str) -> None:
    model = tiny_model()
    hf_kvopt.enable(model, cache=name)
    first = generate(model, prompt(21), num_return_sequences=3, do_sample=True, return_dict_in_generate=True)
    cache = first[hf_kvopt.CACHE_KEYWORD]
    assert isinstance(cache, QuantizedPagedCache)
    assert first.sequences.shape == (3, 21 + NEW_TOKENS)
    longer = torch.cat([first.sequences, first.sequences[:, :5]], dim=1)
    again = generate(model, unpadded(longer), cache)
    # The same text read anew: tokens are stored alone, so that it reads the same however it came in.
    fresh = QuantizedPagedCache(model.config, format=name)
    generate(model, {"input_ids": longer[:, :21], "attention_mask": torch.ones(3, 21)}, fresh, max_new_tokens=1)
    assert torch.equal(again, generate(model, unpadded(longer), fresh))
    cache.check_integrity()


def test_layers_are_stored_as_the_policy_says() -> None:
    cache = QuantizedPagedCache(tiny_config("mixed"), format="int4/int4", layer_formats={0: "int8", "last": "fp8_e4m3"})
    keys, values = states(1, 5)
    for layer in range(3):
        cache.update(keys, values, layer)
    assert [layer.pool.keys.format.name for layer in cache.layers] == ["int8", "int4", "fp8_e4m3"]
    kept = QuantizedPagedCache(tiny_config("mixed"), format="int4", skip_layers=("first", 1))
    assert [layer.format.name for layer in kept.layers] == ["native", "native", "int4"]


@pytest.mark.parametrize("name", FORMATS)
def test_latents_are_stored_in_the_keys_format(name: str) -> None:
    config = DeepseekV3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1,
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = []
    model = DeepseekV3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    for attention in (True, False):
        hf_kvopt.enable(model, cache=name, attention=attention)
        out = generate(model, {"input_ids": torch.arange(3, 20)[None]}, return_dict_in_generate=True)
        tokens.append(out.sequences)
        planes = out[hf_kvopt.CACHE_KEYWORD].layers[0].pool.planes
        assert {plane.format.name for plane in planes} == {get_kv_format(name).k.name}
        assert not any(plane.rotates or plane.centres for plane in planes)
        hf_kvopt.disable(model)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["int8", "int4/int4"])
def test_decoder_and_cross_attention_are_both_quantized(name: str) -> None:
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf_kvopt.enable(T5ForConditionalGeneration(config).eval(), cache=name, layer_formats={"last": "int8"},
                            attention=False)  # fmt: skip
    out = model.generate(torch.arange(3, 20)[None], max_new_tokens=5, return_dict_in_generate=True)
    for cache in (out[hf_kvopt.CACHE_KEYWORD].self_attention_cache, out[hf_kvopt.CACHE_KEYWORD].cross_attention_cache):
        assert [layer.format.name for layer in cache.layers] == [name, "int8"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_value_that_is_no_number_shows_in_its_own_row_and_no_other(name: str, bad: float) -> None:
    cache = QuantizedPagedCache(format=name)
    keys, values = states(2, 5)
    values[1, 0, 3, 2] = bad
    cache.update(keys, values, 0)
    read = cache.layers[0].values.clone()
    assert read[0].isfinite().all()
    assert read[1, 0, 3, 2].isnan()
    assert read[1, 0, [0, 1, 2, 4]].isfinite().all()
    assert read[1, 1].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_what_would_overflow_float8_is_scaled_and_clamped(name: str) -> None:
    cache = QuantizedPagedCache(format=name)
    keys, values = states(1, 5)
    cache.update(1e4 * keys, 1e5 * values, 0)
    for read, states_in in ((cache.layers[0].keys.clone(), 1e4 * keys), (cache.layers[0].values.clone(), 1e5 * values)):
        assert read.isfinite().all()
        assert ((read - states_in).abs() <= 0.2 * states_in.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("size", [1e-14, 1e-30])
@pytest.mark.parametrize("name", FORMATS)
def test_what_no_scale_can_resolve_reads_as_nothing(name: str, size: float) -> None:
    cache = QuantizedPagedCache(format=name)
    keys, values = states(1, 5)
    for read in cache.update(size * keys, size * values, 0):
        assert read.clone().abs().max() <= 10 * size


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"native, int8, fp8_e4m3, fp8_e5m2, int4, k8v4.*got 'int2'"):
        QuantizedPagedCache(format="int2")
    with pytest.raises(ValueError, match="'fp8_e4m3', 'fp8_e5m2', 'int3', 'int4', 'int8', 'k4v2', 'k8v4', 'paged'"):
        hf_kvopt.enable(tiny_model(), cache="int2")


@pytest.mark.parametrize(
    ("name", "meant"), [("blok_size", "block_size"), ("exact_prefil", "exact_prefill"), ("formats", "format")]
)
def test_an_unknown_option_suggests_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"takes no option '{name}': expected one of .*; did you mean '{meant}'\?"):
        QuantizedPagedCache(**{name: 1})


def test_an_unknown_guard_lists_the_known() -> None:
    with pytest.raises(ValueError, match="guard must be one of auto, off: got 'on'"):
        QuantizedPagedCache(guard="on")


def test_layers_named_from_the_end_need_the_config() -> None:
    with pytest.raises(ValueError, match="needs the model's config"):
        QuantizedPagedCache(skip_layers=("last",))
    with pytest.raises(ValueError, match="layer 7 does not exist: got a model of 2 layers"):
        QuantizedPagedCache(LlamaConfig(num_hidden_layers=2), skip_layers=(7,))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_head_size_that_cannot_be_packed_is_refused_and_the_cache_goes_on(layer: int) -> None:
    cache = QuantizedPagedCache(format="int4/int4")
    if layer:
        cache.update(*states(1, 5), 0)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 2 for int4: got 7; use int8"):
        cache.update(*states(1, 5, dim=7), layer)
    cache.reset()
    cache.update(*states(1, 5), 0)
    cache.check_integrity()


def test_float8_on_a_card_without_it_is_refused_when_the_cache_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "device_target", lambda index: Target("sm80", 108, (8, 0)))
    for make in (
        lambda: QuantizedPagedCache(format="fp8_e4m3"),
        lambda: QuantizedPagedCache(format="int4/fp8_e4m3"),
        lambda: QuantizedPagedCache(layer_formats={0: "fp8_e4m3"}),
        lambda: hf_kvopt.enable(model, cache="fp8_e4m3"),
    ):
        with pytest.raises(UnsupportedDevice, match=r"fp8_e4m3 needs compute capability 8.9: got 8.0; use int8"):
            make()
    QuantizedPagedCache(format="int8")
