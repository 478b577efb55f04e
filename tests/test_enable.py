"""enable and disable: what changes on the model, what each way to call generate() then gives, what is refused."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MiniMaxM3VLTextConfig,
)

import hf_kvopt
from hf_kvopt import PagedCache, UnsupportedModel, compat, disable, enable
from hf_kvopt.overrides import attention
from tests.helpers import KINDS, NEW_TOKENS, eager_continuation, eager_tokens, generate, prompt, tiny_model, unpadded

pytestmark = pytest.mark.usefixtures("one_thread")


def caches_of(model: Any, **options: Any) -> Any:
    """Generate and hand back the cache that was used."""
    return generate(model, prompt(9, 6), return_dict_in_generate=True, **options)[hf_kvopt.CACHE_KEYWORD]


@pytest.mark.smoke
@pytest.mark.parametrize("attention", [True, False], ids=["with attention", "cache alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_generate_uses_the_paged_cache_and_gives_eager_tokens(kind: str, attention: bool) -> None:
    model = tiny_model(kind, "eager")
    assert hf_kvopt.enable(model, cache="paged", attention=attention) is model
    assert torch.equal(generate(model, prompt(17, 33, 5)), eager_tokens(kind, 17, 33, 5))
    assert isinstance(caches_of(model), PagedCache)
    assert model.config._attn_implementation == ("hf_kvopt" if attention else "eager")


def test_every_call_gets_a_cache_of_its_own() -> None:
    model = hf_kvopt.enable(tiny_model())
    first, second = caches_of(model), caches_of(model)
    assert first is not second
    assert not {id(layer) for layer in first.layers} & {id(layer) for layer in second.layers}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disable_puts_everything_back(implementation: str) -> None:
    model = tiny_model("full", implementation)
    before = dict(model.__dict__)
    hf_kvopt.enable(model)
    hf_kvopt.disable(model)
    assert model.config._attn_implementation == implementation
    assert model.__dict__.keys() == before.keys()
    assert type(caches_of(model)) is DynamicCache


def test_disable_without_enable_changes_nothing() -> None:
    model = tiny_model("full", "sdpa")
    assert hf_kvopt.disable(model) is model
    assert hf_kvopt.disable(hf_kvopt.disable(model)).config._attn_implementation == "sdpa"


def test_the_last_enable_counts_and_one_disable_undoes_both() -> None:
    model = tiny_model("full", "sdpa")
    hf_kvopt.enable(model, block_size=32)
    hf_kvopt.enable(model, block_size=64)
    assert caches_of(model).cache_config.block_size == 64
    hf_kvopt.disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert type(caches_of(model)) is DynamicCache


def test_options_reach_the_cache() -> None:
    cache = caches_of(hf_kvopt.enable(tiny_model(), block_size=64, max_tokens=1000))
    assert (cache.cache_config.block_size, cache.cache_config.max_tokens) == (64, 1000)


def test_cache_none_sets_the_attention_alone() -> None:
    model = hf_kvopt.enable(tiny_model("full", "eager"), cache=None)
    assert model.config._attn_implementation == "hf_kvopt"
    assert type(caches_of(model)) is DynamicCache
    assert torch.equal(generate(model, prompt(17, 33, 5)), eager_tokens("full", 17, 33, 5))


def test_a_cache_of_ones_own_goes_before() -> None:
    model, own = hf_kvopt.enable(tiny_model()), PagedCache(block_size=128)
    assert caches_of(model, **{hf_kvopt.CACHE_KEYWORD: own}) is own
    theirs = DynamicCache()
    assert caches_of(model, **{hf_kvopt.CACHE_KEYWORD: theirs}) is theirs


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_implementation_is_honoured_and_right(kind: str, implementation: str) -> None:
    model = hf_kvopt.enable(tiny_model(kind))
    tokens = generate(model, prompt(17, 33, 5), cache_implementation=implementation, disable_compile=True)
    assert torch.equal(tokens, eager_tokens(kind, 17, 33, 5))


def test_use_cache_false_generates_without_one() -> None:
    model = hf_kvopt.enable(tiny_model())
    assert torch.equal(generate(model, prompt(17, 33, 5), use_cache=False), eager_tokens("full", 17, 33, 5))


def test_use_cache_false_beside_a_cache_is_refused() -> None:
    model = hf_kvopt.enable(tiny_model())
    with pytest.raises(hf_kvopt.CacheStateError, match=r"use_cache=False with a cache.*drop use_cache=False"):
        generate(model, prompt(9), PagedCache(), use_cache=False)
    assert torch.equal(generate(model, prompt(9)), eager_tokens("full", 9))


@pytest.mark.parametrize("name", ["pagd", "", "quantized-ish"])
def test_an_unknown_cache_lists_the_known_ones_and_changes_nothing(name: str) -> None:
    model = tiny_model("full", "eager")
    with pytest.raises(ValueError, match=f"unknown cache '{name}': expected one of .*'paged'"):
        hf_kvopt.enable(model, cache=name)
    assert model.config._attn_implementation == "eager"
    assert type(caches_of(model)) is DynamicCache


@pytest.mark.parametrize(
    ("name", "meant"),
    [("pagd", "paged"), ("int-8", "int8"), ("INT8", "int8"), ("fp8", "fp8_e4m3"), ("k8_v4", "k8v4"), ("static", None)],
)
def test_an_unknown_cache_suggests_what_was_meant(name: str, meant: str | None) -> None:
    with pytest.raises(ValueError, match="unknown cache") as caught:
        hf_kvopt.enable(tiny_model(), cache=name)
    assert ("did you mean" in str(caught.value)) == (meant is not None)
    assert meant is None or str(caught.value).endswith(f"; did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 24}, ValueError, "block_size must be a power of two"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be a positive number"),
        ({"compileable": True}, ValueError, "compileable=True needs max_tokens"),
        ({"blok_size": 32}, TypeError, r"takes no option 'blok_size' .*'block_size'.*; did you mean 'block_size'\?"),
        ({"prefixsharing": True}, TypeError, r"did you mean 'prefix_sharing'\?"),
        ({"atention": False}, TypeError, r"did you mean 'attention'\?"),
        ({"cache": "int8", "exact_prefil": True}, TypeError, r"did you mean 'exact_prefill'\?"),
        ({"cache": "paged", "guard": "off"}, TypeError, r"takes no option 'guard' with cache='paged'"),
        ({"prefix_sharing": True, "max_token": 64}, TypeError, r"did you mean 'max_tokens'\?"),
        ({"config": None}, TypeError, "config"),
        ({"cache": None, "block_size": 32}, ValueError, "block_size"),
    ],
    ids=[
        "block size", "max tokens", "compileable", "misspelled", "misspelled sharing", "misspelled attention",
        "misspelled for a format", "of another cache", "misspelled for a store", "config", "no cache to give it to",
    ],
)  # fmt: skip
def test_bad_options_are_refused_at_once_and_leave_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = hf_kvopt.enable(tiny_model("full", "eager"), block_size=128)
    with pytest.raises(error, match=message):
        hf_kvopt.enable(model, **options)
    assert caches_of(model).cache_config.block_size == 128
    assert hf_kvopt.disable(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "gpt2", None], ids=["module", "name", "nothing"])
def test_what_is_no_transformers_model_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=rf"enable takes a transformers model: got {type(thing).__name__}"):
        hf_kvopt.enable(thing)


def test_an_enabled_model_can_be_saved_and_loads_plain(tmp_path: Any) -> None:
    model = hf_kvopt.enable(tiny_model("full", "eager"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(generate(loaded, prompt(9)), eager_tokens("full", 9))


def test_requests_past_the_cap_are_refused_and_the_next_call_works() -> None:
    model = hf_kvopt.enable(tiny_model(), max_tokens=64)
    with pytest.raises(hf_kvopt.OutOfBlocks, match="raise max_tokens"):
        generate(model, prompt(40, 40))
    assert torch.equal(generate(model, prompt(9, 6)), eager_tokens("full", 9, 6))


def test_a_copy_of_an_enabled_model_reads_its_own_config() -> None:
    model = hf_kvopt.enable(tiny_model("sliding"), cache="paged")
    twin = copy.deepcopy(model)
    for module in (model, twin):
        assert module.__dict__["_prepare_cache_for_generation"].module is module
    twin.config.sliding_window = 48
    want = generate(hf_kvopt.disable(copy.deepcopy(twin)), prompt(40))
    assert torch.equal(generate(twin, prompt(40)), want)


def test_an_enabled_model_survives_pickling() -> None:
    model = hf_kvopt.enable(tiny_model(), cache="paged", block_size=32)
    twin = pickle.loads(pickle.dumps(model))
    assert twin.__dict__["_prepare_cache_for_generation"].module is twin
    assert torch.equal(generate(twin, prompt(20)), generate(model, prompt(20)))


def test_a_model_that_nothing_holds_says_so() -> None:
    with pytest.raises(hf_kvopt.KVOptError, match="keep it, model = "):
        hf_kvopt.enable(tiny_model(), draft="prompt_lookup").generate(**prompt(9))


def test_an_enabled_model_is_freed_when_it_is_dropped() -> None:
    model = hf_kvopt.enable(tiny_model(), cache="paged")
    plain = tiny_model()
    alive, plain_alive = weakref.ref(model), weakref.ref(plain)
    gc.disable()
    try:
        del model, plain
        assert (alive() is None) == (plain_alive() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4", "k4v2", "int3", "int8/int4"])
def test_a_format_is_the_name_of_a_cache(name: str) -> None:
    model = hf_kvopt.enable(tiny_model(), cache=name, skip_layers=("last",), layer_formats={"last": "int8"})
    out = generate(model, prompt(9, 6), return_dict_in_generate=True)
    layers = out[hf_kvopt.CACHE_KEYWORD].layers
    assert [layer.format.name for layer in layers] == [name, "int8"]
    assert all(plane.tensors[0].element_size() == 1 for plane in layers[0].pool.planes)


def test_a_format_beside_the_name_of_a_cache_is_refused() -> None:
    model = tiny_model(attention="sdpa")
    with pytest.raises(TypeError, match="cache='int8' and a format; drop one"):
        hf_kvopt.enable(model, cache="int8", format="int4")
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_the_model_does_not_have_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="layer 2 does not exist: got a model of 2 layers"):
        hf_kvopt.enable(tiny_model(), cache="int8", skip_layers=(2,))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_attention_is_told_of_a_cache_that_does_not_fit(kind: str, implementation: str) -> None:
    first, second = (hf_kvopt.enable(tiny_model(kind, implementation, seed=seed), attention=False) for seed in (0, 1))
    cache = PagedCache(first.config)
    text = generate(first, prompt(30), cache)
    longer = {"input_ids": torch.cat([text, text[:, :5]], dim=1), "attention_mask": torch.ones(1, 47).long()}
    for inputs in (unpadded(text[:, :41]), unpadded(text[:, :30]), {"input_ids": text[:, :41]}):
        with pytest.raises(hf_kvopt.CacheStateError, match=r"not shorter than the prompt.*cache\.crop\(-n\)"):
            generate(first, inputs, cache)
    with pytest.raises(hf_kvopt.CacheStateError, match=r"filled by another model.*cache\.free\(\)"):
        generate(second, longer, cache)
    for each in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache), cache):
        assert torch.equal(generate(first, longer, each), eager_continuation(kind, longer["input_ids"]))
    cache.free()
    assert torch.equal(generate(second, prompt(30), cache), generate(second, prompt(30)))


def test_new_tokens_alone_with_a_mask_over_all_go_on_with_a_cache() -> None:
    model, cache = hf_kvopt.enable(tiny_model("full", "sdpa"), attention=False), PagedCache()
    text = torch.cat([generate(model, prompt(30), cache), prompt(5, seed=2)["input_ids"]], dim=1)
    inputs = {"input_ids": text[:, 41:], "attention_mask": torch.ones_like(text)}
    assert torch.equal(generate(model, inputs, cache)[:, 6:], eager_continuation("full", text)[:, 47:])


def written_in() -> Any:
    """Make a model whose attention is written into it."""
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FalconForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def selecting() -> Any:
    """Make a model that attends to a sparse selection of keys."""
    config = MiniMaxM3VLTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, dense_intermediate_size=48, shared_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rotary_dim=4, index_n_heads=2,
        index_head_dim=8, index_block_size=4, index_topk_blocks=2, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention", "minimax_m3_sparse"], mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.smoke
@pytest.mark.parametrize("make", [written_in, selecting])
def test_a_model_that_takes_no_other_attention_keeps_its_own_which_is_said_once(make: Any, caplog: Any) -> None:
    attention._say_once.cache_clear()
    model = make()
    want = generate(model, prompt(20))
    for _ in range(2):
        assert hf_kvopt.enable(model) is model
        assert model.config._attn_implementation == "eager"
        assert isinstance(caches_of(model), PagedCache)
        assert torch.equal(generate(model, prompt(20)), want)
    said = [record.getMessage() for record in caplog.records if "the model's own attention" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(type(model).__name__)


@pytest.mark.parametrize("make", [written_in, selecting])
@pytest.mark.parametrize("options", [{"attention": True}, {"cache": None}], ids=["asked for", "nothing else to enable"])
def test_our_attention_by_name_is_refused_where_a_model_does_not_take_it(make: Any, options: Any) -> None:
    model = make()
    before = dict(model.__dict__)
    with pytest.raises(hf_kvopt.UnsupportedModel, match=r"got (attention=True|cache=None); call enable\(model\)"):
        hf_kvopt.enable(model, **options)
    assert model.__dict__ == before


def test_a_model_that_keeps_its_own_attention_and_cache_can_still_speculate() -> None:
    want = generate(written_in(), prompt(20))
    assert torch.equal(generate(hf_kvopt.enable(written_in(), cache=None, draft="prompt_lookup"), prompt(20)), want)


def test_attention_is_ours_unless_something_speaks_against_it(caplog: Any) -> None:
    for options in ({}, {"attention": None}, {"attention": True}):
        assert hf_kvopt.enable(tiny_model("full", "eager"), **options).config._attn_implementation == "hf_kvopt"
    assert not caplog.records


def test_weights_are_refused_under_our_attention_and_given_by_the_models_own() -> None:
    options = {"output_attentions": True, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match="got output_attentions=True"):
        generate(hf_kvopt.enable(tiny_model("mixed", "eager")), prompt(9), **options)
    want = generate(tiny_model("mixed", "eager"), prompt(30), **options).attentions
    got = generate(hf_kvopt.enable(tiny_model("mixed", "eager"), attention=False), prompt(30), **options).attentions
    for step, expected in zip(got, want, strict=True):
        for weights, eager in zip(step, expected, strict=True):
            assert torch.allclose(weights, eager, atol=1e-5)


def test_weights_are_refused_where_a_model_tells_its_attention_nothing() -> None:
    # GPT-2 hands output_attentions to no attention function.
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    )
    model = hf_kvopt.enable(GPT2LMHeadModel(config).eval())
    with pytest.raises(ValueError, match="got output_attentions=True"):
        generate(model, prompt(9), output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("name", ["generate", compat.PREFILL, compat.MAKE_CACHE])
def test_a_method_that_somebody_replaced_is_not_hidden(name):
    model = tiny_model()
    theirs = getattr(model, name)
    model.__dict__[name] = theirs
    with pytest.raises(UnsupportedModel, match=f"{name} was replaced on this instance"):
        enable(model, draft="prompt_lookup")
    assert model.__dict__[name] is theirs


def test_inputs_that_somebody_prepares_are_fed_while_enabled_and_after():
    model = tiny_model()
    own, calls = model.prepare_inputs_for_generation, []

    def prepare(input_ids, **kwargs):
        calls.append(input_ids.shape[1])
        return own(input_ids, **kwargs)

    model.__dict__["prepare_inputs_for_generation"] = prepare
    enable(model)
    assert torch.equal(generate(model, prompt(9, 6)), eager_tokens("full", 9, 6))
    assert len(calls) == NEW_TOKENS
    disable(model)
    assert model.__dict__["prepare_inputs_for_generation"] is prepare
