"""Small inputs made from public reports: each gave wrong text, or an error where plain transformers gives text."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_kvopt import (
    CACHE_KEYWORD,
    KVOptError,
    PagedCache,
    QuantizedPagedCache,
    disable,
    enable,
    prefix_store,
    speculative,
)
from tests.helpers import prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def text(length: int, rows: int = 1, seed: int = 1) -> Tensor:
    """Draw tokens [rows, length]."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def write(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = 20, **options: Any) -> Any:
    """Generate greedily behind `ids`."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, **options)


@pytest.mark.parametrize("pads", [1, 2, 3, 7, 16, 17, 40])
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_pads_that_all_rows_of_a_cold_batch_share(pads, kind):
    ids = torch.cat([torch.zeros(2, pads, dtype=torch.long), text(60, 2)], dim=1)
    mask = (ids != 0).long()
    model, want = enable(tiny_model(kind), prefix_sharing=True), write(tiny_model(kind, "eager"), ids, mask)
    for _ in range(2):
        assert torch.equal(write(model, ids, mask), want)
    prefix_store(model).check_integrity()


@pytest.mark.parametrize("hole", [1, 5, 30])
def test_a_hole_in_the_mask_shares_nothing(hole):
    ids, mask = text(60), torch.ones(1, 60, dtype=torch.long)
    model = enable(tiny_model(), prefix_sharing=True)
    want = write(model, ids)
    mask[0, hole] = 0
    assert torch.equal(write(model, ids, mask), write(tiny_model("full", "eager"), ids, mask))
    assert torch.equal(write(model, ids), want)


def phi3(attention: str = "eager") -> Phi3ForCausalLM:
    """A model whose rotary factors change beyond 64 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64, "short_mscale": 1.0, "long_mscale": 1.0,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Phi3ForCausalLM._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("length", [20, 50, 63, 64, 65, 110])
@pytest.mark.parametrize("cache", ["paged", "int8"])
def test_our_cache_is_used_below_across_and_beyond_the_original_length(length, cache):
    ids = text(length)
    out = write(enable(phi3(), cache=cache), ids, return_dict_in_generate=True)
    assert isinstance(out[CACHE_KEYWORD], PagedCache)
    assert out[CACHE_KEYWORD].get_seq_length() == length + 19
    if cache == "paged":
        assert torch.equal(out.sequences, write(phi3(), ids))


@pytest.mark.parametrize("length", [20, 55, 110])
def test_drafts_of_such_a_model_are_equal_or_refused(length):
    ids = text(length)
    model = enable(phi3(), draft=speculative("prompt_lookup", fallback=False))
    try:
        got = write(model, ids)
    except KVOptError:
        assert length + 20 > 64
        return
    assert torch.equal(got, write(phi3(), ids))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")], ids=["interrupt", "error"])
@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_draft_that_breaks_off_gives_the_callers_cache_back(error, at, format):
    model = tiny_model()

    def make() -> PagedCache:
        return PagedCache(model.config) if format is None else QuantizedPagedCache(model.config, format=format)

    repeated = torch.cat([text(10, 3, 4)] * 5, dim=1)

    def turns(cache: PagedCache) -> Tensor:
        return torch.cat([write(model, repeated, new=10, **{CACHE_KEYWORD: cache}), text(4, 3, 50)], dim=1)

    cache, untouched = make(), make()
    ids = turns(cache)
    assert torch.equal(turns(untouched), ids)
    held, left = cache.get_seq_length(), [at]

    def stop(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    hook = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(type(error)):
        write(model, ids, **{CACHE_KEYWORD: cache}, custom_generate=speculative("prompt_lookup", fallback=False))
    hook.remove()
    assert cache.get_seq_length() == held
    cache.check_integrity()
    assert torch.equal(write(model, ids, **{CACHE_KEYWORD: cache}), write(model, ids, **{CACHE_KEYWORD: untouched}))


class PerRow(StoppingCriteria):
    """Keeps a state a row, and looks at each row of the batch."""

    def __init__(self, token: int) -> None:
        self.token, self.done = token, [False, False]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for row, _done in enumerate(self.done):
            self.done[row] |= int(input_ids[row, -1]) == self.token
        return torch.tensor(self.done)


@pytest.mark.parametrize("token", [999, 5, 17])
def test_criteria_that_look_at_the_batch(token):
    ids = text(20, 2)
    want = write(tiny_model("full", "eager"), ids, stopping_criteria=StoppingCriteriaList([PerRow(token)]))
    model = enable(tiny_model(), draft=speculative("prompt_lookup", fallback=False))
    assert torch.equal(write(model, ids, stopping_criteria=StoppingCriteriaList([PerRow(token)])), want)


@pytest.mark.parametrize("sharing", [False, True], ids=["cache of a call", "prefix store"])
def test_a_model_that_changes_its_dtype_and_back(sharing):
    ids, model = text(60), enable(tiny_model(), prefix_sharing=sharing)
    want = write(model, ids)
    model.to(torch.bfloat16)
    half = tiny_model().to(torch.bfloat16)
    assert torch.equal(write(model, ids, new=4), write(half, ids, new=4))
    model.load_state_dict(tiny_model().state_dict())
    model.to(torch.float32)
    model.load_state_dict(tiny_model().state_dict())
    assert torch.equal(write(model, ids), want)
    if sharing:
        prefix_store(model).check_integrity()


@pytest.mark.parametrize("make", [PagedCache, lambda config: QuantizedPagedCache(config, format="int8")])
def test_a_cache_that_was_reset_takes_another_dtype_and_geometry(make):
    ids, cache = text(40), make(tiny_model().config)
    write(tiny_model(), ids, **{CACHE_KEYWORD: cache})
    cache.reset()
    half = tiny_model().to(torch.bfloat16)
    fresh = make(half.config)
    assert torch.equal(write(half, ids, **{CACHE_KEYWORD: cache}), write(half, ids, **{CACHE_KEYWORD: fresh}))
    cache.check_integrity()


def test_hidden_states_of_a_warm_prompt_are_those_of_all_its_positions():
    ids, options = text(60), {"output_hidden_states": True, "return_dict_in_generate": True, "new": 3}
    model = enable(tiny_model(), prefix_sharing=True)
    write(model, ids)
    got, want = write(model, ids, **options), write(tiny_model("full", "eager"), ids, **options)
    for mine, theirs in zip(got.hidden_states[0], want.hidden_states[0], strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("layers", [(4, 2), (3, 1)], ids=str)
def test_encoders_and_decoders_of_unequal_depths(layers):
    config = T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=layers[0], num_decoder_layers=layers[1], num_heads=4,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = T5ForConditionalGeneration(config).eval(), text(30)
    want = write(model, ids)
    pairs = [
        (PagedCache(config), DynamicCache(config=config)),
        (PagedCache(config), PagedCache()),
        (PagedCache(), PagedCache()),
    ]
    for pair in pairs:
        assert torch.equal(write(model, ids, **{CACHE_KEYWORD: EncoderDecoderCache(*pair)}), want)
    enable(model)
    for _ in range(2):
        assert torch.equal(write(model, ids), want)
        assert torch.equal(write(model, ids, num_beams=2), write(disable(model), ids, num_beams=2))
        enable(model)


@pytest.mark.parametrize("attention", ["hf_kvopt", "sdpa", "eager"])
def test_use_cache_false_beside_a_cache_is_refused_by_name(attention):
    with pytest.raises((KVOptError, ValueError), match="use_cache"):
        write(tiny_model("full", attention), text(20), **{CACHE_KEYWORD: PagedCache()}, use_cache=False)


def test_prompts_with_padding_go_on_alike_turn_by_turn():
    inputs, model = prompt(30, 17), enable(tiny_model(), prefix_sharing=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(3):
        want = write(tiny_model("full", "eager"), ids, mask, new=9)
        assert torch.equal(write(model, ids, mask, new=9), want)
        ids, mask = want, torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], dim=1)
