"""Speculation gives exactly the tokens of plain greedy decoding in float32, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import hf_kvopt
from hf_kvopt import PagedCache, QuantizedPagedCache, speculative
from tests.helpers import KINDS, eager_tokens, generate, prompt, tiny_model
from tests.speculation.drafters import Forest, noisy

LENGTHS = {"batch 1": (9,), "batch 3, padded": (9, 6, 14), "batch 8, padded": (9, 6, 14, 3, 30, 21, 1, 17)}
DRAFTS = ("assistant", "suffix", "prompt_lookup", "lookahead")
EOS = [11, 12, 13, 14, 15, 16, 20, 30, 40]
NEW = 24


def drafter(name: str, kind: str = "full") -> Any:
    return noisy(kind) if name == "assistant" else name


def speculate(draft: Any, kind: str, lengths: tuple[int, ...], cache: Any = None, **options: Any) -> Tensor:
    model = tiny_model(kind, options.pop("attention", "hf_kvopt"))
    spec = speculative(draft, gamma=options.pop("gamma", 4), fallback=False, num_nodes=options.pop("num_nodes", None))
    settings = {"max_new_tokens": NEW, "do_sample": False, hf_kvopt.CACHE_KEYWORD: cache, **options}
    return model.generate(**prompt(*lengths), custom_generate=spec, **settings)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_tokens_are_those_of_plain_decoding(draft: str, kind: str, lengths: tuple[int, ...]) -> None:
    wanted = eager_tokens(kind, *lengths, max_new_tokens=NEW)
    assert torch.equal(speculate(drafter(draft, kind), kind, lengths), wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_of_the_model_does_not_matter(kind: str, attention: str) -> None:
    wanted = eager_tokens(kind, 9, 6, 14, max_new_tokens=NEW)
    assert torch.equal(speculate(noisy(kind), kind, (9, 6, 14), attention=attention), wanted)


@pytest.mark.parametrize("attention", ["hf_kvopt", "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_trees_give_the_same_tokens(kind: str, attention: str) -> None:
    wanted = eager_tokens(kind, 30, max_new_tokens=NEW)
    forest = Forest(wanted, wrong_at=(31, 33, 40, 41, 50))
    assert torch.equal(speculate(forest, kind, (30,), num_nodes=12, attention=attention), wanted)


def test_trees_accept_what_they_hold() -> None:
    wanted = eager_tokens("full", 30, max_new_tokens=NEW)
    spec = speculative(Forest(wanted), gamma=4, num_nodes=12, fallback=False)
    tiny_model().generate(**prompt(30), custom_generate=spec, max_new_tokens=NEW, do_sample=False)
    # 23 tokens after the first, five a step, of which the last may not fit.
    assert spec.stats.steps <= 6
    assert spec.stats.mean_accepted_length > 4


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_end_by_themselves(lengths: tuple[int, ...]) -> None:
    options = {"eos_token_id": EOS, "pad_token_id": 0, "max_new_tokens": NEW}
    wanted = generate(tiny_model("full", "eager"), prompt(*lengths), None, **options)
    got = speculate(noisy(), "full", lengths, eos_token_id=EOS, pad_token_id=0)
    assert torch.equal(got, wanted)
    if len(lengths) > 3:
        ends = (wanted[:, -1] == 0).sum()
        assert ends > 0, "no row ends before the others"


PROCESSORS = {
    "repetition": {"repetition_penalty": 1.3},
    "minimum length": {"min_new_tokens": 9, "eos_token_id": EOS},
    "bad words": {"bad_words_ids": [[5], [7, 8], [12]]},
    "n-grams": {"no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 2.0},
    "all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_length": 20, "eos_token_id": EOS},
}


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("lengths", [(9,), (9, 6, 14)], ids=["batch 1", "batch 3"])
def test_processors_see_the_prefix_that_plain_decoding_has(lengths: tuple[int, ...], options: dict) -> None:
    wanted = generate(tiny_model("full", "eager"), prompt(*lengths), None, max_new_tokens=NEW, **options)
    assert torch.equal(speculate(noisy(), "full", lengths, **options), wanted)


def test_processors_see_each_path_of_a_tree() -> None:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    wanted = generate(tiny_model("full", "eager"), prompt(30), None, max_new_tokens=NEW, **options)
    assert torch.equal(speculate(Forest(wanted, (35, 36)), "full", (30,), num_nodes=12, **options), wanted)


def test_allowed_tokens_are_asked_for_by_row() -> None:
    def allowed(row: int, text: Tensor) -> list[int]:
        return [3 + (int(text[-1]) * 7 + row * 11 + k * len(text)) % 90 for k in range(6)]

    options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": NEW}
    wanted = generate(tiny_model("full", "eager"), prompt(9, 6, 14), None, **options)
    assert torch.equal(speculate(noisy(), "full", (9, 6, 14), **options), wanted)


class _Third(StoppingCriteria):
    """Criterion that ends a row at its third token divisible by three."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, 14:] % 3 == 0).sum(dim=1) >= 3


def test_stopping_criteria_see_every_token() -> None:
    options = {"stopping_criteria": [_Third()], "eos_token_id": 96, "pad_token_id": 0}
    wanted = generate(tiny_model("full", "eager"), prompt(9, 6, 14), None, max_new_tokens=NEW, **options)
    assert torch.equal(speculate(noisy(), "full", (9, 6, 14), **options), wanted)


class _Shift(LogitsProcessor):
    """A caller's own processor that reads the prefix."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, ((input_ids[:, -1:] * 5 + input_ids[:, -2:-1]) % 97), 50.0)


def test_a_processor_of_the_caller_works() -> None:
    options = {"logits_processor": [_Shift()]}
    wanted = generate(tiny_model("full", "eager"), prompt(9, 6), None, max_new_tokens=NEW, **options)
    assert torch.equal(speculate("prompt_lookup", "full", (9, 6), **options), wanted)


def test_scores_and_logits_are_recorded_for_each_token() -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    wanted = generate(tiny_model("full", "eager"), prompt(9, 6, 14), None, max_new_tokens=NEW, **options)
    got = speculate(noisy(), "full", (9, 6, 14), **options)
    assert torch.equal(got.sequences, wanted.sequences)
    for ours, theirs in ((got.scores, wanted.scores), (got.logits, wanted.logits)):
        assert len(ours) == len(theirs) == NEW
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    assert got[hf_kvopt.CACHE_KEYWORD].get_seq_length() == got.sequences.shape[1] - 1


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_no_token_too_many(new: int) -> None:
    wanted = eager_tokens("full", 9, 6, 14, max_new_tokens=new)
    assert torch.equal(speculate(noisy(), "full", (9, 6, 14), max_new_tokens=new), wanted)


@pytest.mark.parametrize("draft", ["assistant", "prompt_lookup"])
@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("held", [1, 16, 29])
def test_a_cache_that_holds_part_of_the_prompt_is_used(held: int, kind: str, draft: str) -> None:
    model, inputs = tiny_model(kind), prompt(30)
    cache = PagedCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :held], **{hf_kvopt.CACHE_KEYWORD: cache})
    spec = speculative(drafter(draft, kind), gamma=4, fallback=False)
    got = generate(model, inputs, cache, custom_generate=spec, max_new_tokens=NEW)
    assert torch.equal(got, eager_tokens(kind, 30, max_new_tokens=NEW))
    assert cache.get_seq_length() == 30 + NEW - 1


@pytest.mark.parametrize("lengths", [(9,), (9, 6, 14)], ids=["batch 1", "batch 3"])
def test_a_second_turn_goes_on_with_the_cache(lengths: tuple[int, ...]) -> None:
    model = tiny_model()
    cache, spec = PagedCache(config=model.config), speculative(noisy(), gamma=4, fallback=False)
    options = {"eos_token_id": EOS, "pad_token_id": 0, "max_new_tokens": NEW}
    first = generate(model, prompt(*lengths), cache, custom_generate=spec, **options)
    new = first[:, max(lengths) :]
    is_end = torch.isin(new, torch.tensor(EOS)).long()
    mask = torch.cat([prompt(*lengths)["attention_mask"], (is_end.cumsum(1) - is_end == 0).long()], dim=1)
    turn = prompt(*[7] * len(lengths), seed=3)["input_ids"]
    inputs = {"input_ids": torch.cat([first, turn], dim=1), "attention_mask": torch.cat([mask, turn * 0 + 1], dim=1)}
    wanted = generate(tiny_model("full", "eager"), inputs, None)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(generate(model, inputs, cache, custom_generate=spec), wanted)
    cache.check_integrity()


CACHES = {
    "capped": lambda config: PagedCache(config=config, max_tokens=3 * 48),
    "compileable": lambda config: PagedCache(config=config, max_tokens=3 * 48, compileable=True),
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("lengths", [(14,), (9, 6, 14)], ids=["batch 1", "batch 3"])
def test_every_cache_will_do(make: Any, lengths: tuple[int, ...]) -> None:
    wanted = eager_tokens("full", *lengths, max_new_tokens=NEW)
    got = speculate(noisy(), "full", lengths, make(tiny_model().config), gamma=6)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("format_name", ["int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4"])
@pytest.mark.parametrize("lengths", [(14,), (9, 6, 14), (70,), (43, 70)], ids=str)
def test_quantized_storage_takes_drafts_back(lengths: tuple[int, ...], format_name: str) -> None:
    config, options = tiny_model().config, {"format": format_name, "block_size": 16}
    wanted = generate(tiny_model(), prompt(*lengths), QuantizedPagedCache(config=config, **options), max_new_tokens=NEW)
    got = speculate(noisy(), "full", lengths, QuantizedPagedCache(config=config, **options))
    assert torch.equal(got, wanted)


def test_trees_move_quantized_tokens_with_their_scales() -> None:
    config = tiny_model().config
    wanted = generate(tiny_model(), prompt(30), QuantizedPagedCache(config=config, format="int8"), max_new_tokens=NEW)
    cache = QuantizedPagedCache(config=config, format="int8")
    assert torch.equal(speculate(Forest(wanted, (35,)), "full", (30,), cache, num_nodes=12), wanted)


def test_no_block_is_lost_and_rows_leave() -> None:
    model = tiny_model()
    hf_kvopt.enable(model)
    spec = speculative(noisy(), gamma=4, fallback=False)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
    wanted = generate(tiny_model("full", "eager"), prompt(*LENGTHS["batch 8, padded"]), None, **options)
    got = model.generate(**prompt(*LENGTHS["batch 8, padded"]), custom_generate=spec, **options)
    assert torch.equal(got, wanted)
    assert spec.stats.row_steps < 8 * spec.stats.steps
