"""Drafts for models with convolution and recurrent states: these go back to the token that each row kept, bit for bit.

Compared are the tokens of plain decoding, and the states that a call leaves in a cache of the caller.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import hf_kvopt
from hf_kvopt import PagedCache, UnsupportedModel, speculative
from hf_kvopt.cache import recording
from hf_kvopt.cache.states import StateLayer
from hf_kvopt.cache.stepwise import TokenByToken, holders, stepwise
from hf_kvopt.errors import CacheStateError
from tests.models.cases import Case
from tests.models.tiny import build
from tests.speculation.drafters import Oracle

pytestmark = pytest.mark.usefixtures("one_thread")
# A gated delta rule, Mamba 2 beside keys in one layer, convolutions alone, Mamba 1, a value of the token before.
NAMES = ["qwen3_next", "falcon_h1", "lfm2", "jamba", "zaya"]
each_kind = pytest.mark.parametrize("name", NAMES)
NEW = 16
PADS = (0, 3, 1)


def built(name: str) -> PreTrainedModel:
    return build(Case(name, "text"))


def inputs(rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Rows with padding on the left."""
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(PADS[:rows]):
        mask[row, :pad], ids[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model: PreTrainedModel, given: dict[str, Tensor], **kwargs: Any) -> Any:
    return model.generate(**given, max_new_tokens=NEW, do_sample=False, **kwargs)


def spoiled(text: Tensor) -> Tensor:
    """A draft that is wrong at other places in each row."""
    text = text.clone()
    for row in range(len(text)):
        for place in range(13 + row, text.shape[1], 4 + row):
            text[row, place] = (text[row, place] + 1) % 50
    return text


def drafting(text: Tensor, **kwargs: Any) -> Any:
    return speculative(Oracle(spoiled(text)), gamma=4, fallback=False, **kwargs)


def states_of(cache: PagedCache) -> list[Tensor]:
    layers = cache._stock_layers()
    assert layers
    assert all(isinstance(layer, StateLayer) for layer in layers)
    parts = [part for layer in layers for held in (layer.conv_states, layer.recurrent_states) for part in held.values()]
    return [part for part in parts if part is not None]


def require_alike(ours: PagedCache, plain: PagedCache) -> None:
    """The first layer that holds states, below any attention, has the same bits; others by what attention, which reads
    a draft in another order of summation, puts into them."""
    for i, (a, b) in enumerate(zip(states_of(ours), states_of(plain), strict=True)):
        if i == 0:
            assert torch.equal(a, b)
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@each_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_keep_unlike_numbers_of_tokens_give_the_tokens_of_plain_decoding(name: str, rows: int) -> None:
    model, given = built(name), inputs(rows)
    wanted = tokens(model, given)
    spec = drafting(wanted)
    assert torch.equal(tokens(model, given, custom_generate=spec), wanted)
    assert 0 < spec.stats.steps < NEW - 1
    assert sum(spec.stats.accepted_by_depth)


@each_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_the_caller_is_left_with_the_states_of_plain_decoding(name: str, rows: int) -> None:
    model, given = built(name), inputs(rows)
    caches = [PagedCache(config=model.config.get_text_config()) for _ in range(2)]
    wanted = tokens(model, given, **{hf_kvopt.CACHE_KEYWORD: caches[0]})
    spec = drafting(wanted)
    got = tokens(model, given, custom_generate=spec, **{hf_kvopt.CACHE_KEYWORD: caches[1]})
    assert torch.equal(got, wanted)
    require_alike(caches[1], caches[0])
    assert not caches[1].records_states
    longer = {"input_ids": torch.cat([wanted, wanted[:, :5]], dim=1)}
    longer["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, NEW + 5), value=1)
    texts = [tokens(model, longer, **{hf_kvopt.CACHE_KEYWORD: cache}) for cache in caches]
    assert torch.equal(texts[0], texts[1])


@each_kind
def test_rows_that_end_early_are_handed_back_as_plain_decoding_leaves_them(name: str) -> None:
    model, given = built(name), inputs()
    text = tokens(model, given)
    kwargs = {"eos_token_id": int(text[1, -9]), "pad_token_id": 0, "return_dict_in_generate": True}
    plain = tokens(
        model, given, **{hf_kvopt.CACHE_KEYWORD: PagedCache(config=model.config.get_text_config())}, **kwargs
    )
    drafted = tokens(model, given, custom_generate=drafting(text), **kwargs)
    assert torch.equal(drafted.sequences, plain.sequences)
    require_alike(drafted[hf_kvopt.CACHE_KEYWORD], plain[hf_kvopt.CACHE_KEYWORD])


class _Breaks(LogitsProcessor):
    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("at", [1, 3, 8])
def test_a_call_that_breaks_off_puts_the_states_back(name: str, at: int) -> None:
    model, given = built(name), inputs(1)
    cache = PagedCache(config=model.config.get_text_config())
    text = tokens(model, given, **{hf_kvopt.CACHE_KEYWORD: cache})
    before = [part.clone() for part in states_of(cache)]
    longer = {"input_ids": torch.cat([text, text[:, :6]], dim=1)}
    with pytest.raises(KeyboardInterrupt):
        tokens(
            model, longer, custom_generate=drafting(text), logits_processor=LogitsProcessorList([_Breaks(at)]),
            **{hf_kvopt.CACHE_KEYWORD: cache},
        )  # fmt: skip
    for now, then in zip(states_of(cache), before, strict=True):
        assert torch.equal(now, then)
    wanted = tokens(model, longer)
    assert torch.equal(
        tokens(model, longer, custom_generate=drafting(wanted), **{hf_kvopt.CACHE_KEYWORD: cache}), wanted
    )
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_a_capped_pool_without_room_for_a_draft_reads_the_root_alone(name: str) -> None:
    model, given = built(name), inputs(1, length=30)
    wanted = tokens(model, given)
    cache = PagedCache(config=model.config.get_text_config(), max_tokens=48)
    # 46 tokens are read in the end, and a draft may pass the three blocks.
    spec = speculative(Oracle(torch.nn.functional.pad(wanted, (0, 8), value=7)), gamma=8, fallback=False)
    got = tokens(model, given, custom_generate=spec, **{hf_kvopt.CACHE_KEYWORD: cache})
    assert torch.equal(got, wanted)


@each_kind
def test_sampling_draws_from_states_of_the_kept_tokens(name: str) -> None:
    # With one token to choose from, a sample is the greedy text.
    model, given = built(name), inputs()
    wanted = tokens(model, given)
    got = model.generate(**given, max_new_tokens=NEW, do_sample=True, top_k=1, custom_generate=drafting(wanted))
    assert torch.equal(got, wanted)


@each_kind
@pytest.mark.parametrize("draft", ["prompt_lookup", "suffix", "lookahead"])
def test_every_drafter_by_name_gives_the_tokens_of_plain_decoding(name: str, draft: str) -> None:
    model, given = built(name), inputs()
    wanted = tokens(model, given)
    hf_kvopt.enable(model, draft=speculative(draft, fallback=False))
    assert torch.equal(tokens(model, given), wanted)


def test_a_path_that_leaves_a_token_out_is_refused() -> None:
    model = built("falcon_h1")
    cache = PagedCache(config=model.config)
    recording.begin(cache)
    with stepwise(model), torch.no_grad():
        model(**inputs(1), **{hf_kvopt.CACHE_KEYWORD: cache})
        with pytest.raises(CacheStateError, match=r"states sum up a text in its order: got \[\[0, 2\]\]"):
            cache.keep_paths(3, [[0, 2]])
        cache.keep_paths(3, [[0, 1]])
    assert cache.get_seq_length() == 10


def test_states_that_nobody_copied_are_refused() -> None:
    model = built("qwen3_next")
    cache = PagedCache(config=model.config)
    recording.begin(cache)
    with torch.no_grad():
        model(**inputs(1), **{hf_kvopt.CACHE_KEYWORD: cache})
    with pytest.raises(CacheStateError, match="got 3 tokens read, and copies before 0 of them"):
        cache.keep_paths(3, [[0, 1]])


def test_two_calls_at_once_take_the_override_off_once() -> None:
    model = built("lfm2")
    with stepwise(model):
        with stepwise(model):
            pass
        assert all(isinstance(vars(module)["forward"], TokenByToken) for module in holders(model))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_cache_of_fixed_capacity_with_states_is_refused() -> None:
    model = built("qwen3_next")
    cache = PagedCache(config=model.config, compileable=True, max_tokens=128)
    with pytest.raises(UnsupportedModel, match="cannot be taken back token by token"):
        tokens(model, inputs(1), custom_generate=speculative("suffix"), **{hf_kvopt.CACHE_KEYWORD: cache})
