"""Refusals of speculation: one error before the first token, and an unchanged model."""

import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, TextStreamer

from hf_kvopt import CACHE_KEYWORD, CacheStateError, PagedCache, UnsupportedModel, speculative
from hf_kvopt.speculation.drafters.base import Drafter, DraftSession
from hf_kvopt.speculation.drafters.lookahead import Lookahead
from hf_kvopt.speculation.drafters.prompt_lookup import PromptLookup
from tests.helpers import NEW_TOKENS, eager_tokens, generate, prompt, tiny_model
from tests.models.cases import covered_cases
from tests.models.tiny import build
from tests.speculation.drafters import noisy
from tests.speculation.test_verify import small

SETTINGS = {
    "an unknown name": (("lookback",), {}, "expected one of"),
    "a misspelt name": (("prompt_lokup",), {}, "did you mean 'prompt_lookup'"),
    "gamma of 0": (("lookahead",), {"gamma": 0}, "gamma must be an integer of at least 1"),
    "gamma as a float": (("lookahead",), {"gamma": 2.0}, "gamma must be an integer"),
    "nodes below 0": (("lookahead",), {"num_nodes": -1}, "num_nodes must be"),
    "an unknown acceptance": (("lookahead",), {"acceptance": "lossy"}, "acceptance must be one of"),
    "stop strings alone": (("lookahead",), {"stop_strings": "x"}, "need the tokenizer"),
}


@pytest.mark.parametrize(("args", "options", "said"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_cannot_work(args: tuple, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        speculative(*args, **options)


def test_something_that_is_no_drafter() -> None:
    with pytest.raises(TypeError, match="got int"):
        speculative(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: PromptLookup(0), lambda: Lookahead(1)], ids=["lookup", "lookahead"])
def test_drafters_that_cannot_match(make: Any) -> None:
    with pytest.raises(ValueError, match="at least"):
        make()


CALLS = {
    "beams": ({"num_beams": 3}, ValueError, "num_beams=3"),
    "ranks that go in step": ({"synced_gpus": True}, UnsupportedModel, "synced_gpus=True"),
    "no cache": ({"use_cache": False}, ValueError, "use_cache=False"),
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        ValueError,
        "scores and logits alone",
    ),
    "a foreign cache": ({CACHE_KEYWORD: DynamicCache()}, CacheStateError, "got a DynamicCache"),
}


@pytest.mark.parametrize(("options", "kind", "said"), CALLS.values(), ids=CALLS)
def test_calls_that_cannot_work(options: dict, kind: type[Exception], said: str) -> None:
    model = tiny_model()
    before = set(vars(model))
    with pytest.raises(kind, match=said):
        generate(model, prompt(9, 6), custom_generate=speculative(noisy()), **{"cache": None, **options})
    assert set(vars(model)) == before
    assert torch.equal(generate(model, prompt(9, 6)), eager_tokens("full", 9, 6))


def test_an_assistant_with_another_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"vocabularies of 97 \(target\) and 12"):
        generate(tiny_model(), prompt(9), custom_generate=speculative(small(0)))


def test_typical_acceptance_is_for_sampling_one_row() -> None:
    spec = speculative("lookahead", acceptance="typical")
    with pytest.raises(ValueError, match="for sampling one row"):
        generate(tiny_model(), prompt(9, 6), custom_generate=spec, do_sample=True)
    with pytest.raises(ValueError, match="for sampling one row"):
        generate(tiny_model(), prompt(9), custom_generate=spec)
    out = generate(tiny_model(), prompt(9), custom_generate=spec, do_sample=True)
    assert out.shape == (1, 9 + NEW_TOKENS)


def test_a_streamer_takes_one_row() -> None:
    spec = speculative("lookahead", streamer=TextStreamer(None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes one row: got 2"):
        generate(tiny_model(), prompt(9, 6), custom_generate=spec)


class _Wants(Drafter):
    """Drafter that asks for hidden states, and whose session fails to draft."""

    feature_layers = (0, -1)

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _Breaks()


class _Breaks(DraftSession):
    closed = 0

    def extend(self, read: Any) -> None:
        raise RuntimeError("the head broke")

    propose = select = extend  # type: ignore[assignment]

    def close(self) -> None:
        _Breaks.closed += 1


def test_a_target_without_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = tiny_model(), type(tiny_model()).forward

    @functools.wraps(forward)
    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "output_hidden_states": False})

    cache = PagedCache(config=model.config)
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", without)
        with pytest.raises(ValueError, match="returns none"):
            generate(model, prompt(9, 6), cache, custom_generate=speculative(_Wants()))
    assert cache.get_seq_length() == 0
    cache.check_integrity()


def test_a_drafter_that_breaks_leaves_the_cache_as_it_was() -> None:
    model = tiny_model()
    cache = PagedCache(config=model.config)
    closed = _Breaks.closed
    with pytest.raises(RuntimeError, match="the head broke"):
        generate(model, prompt(9, 6), cache, custom_generate=speculative(_Wants(), fallback=False))
    assert _Breaks.closed == closed + 1
    assert cache.get_seq_length() == 0
    cache.reset()
    assert torch.equal(generate(model, prompt(9, 6), cache), eager_tokens("full", 9, 6))


@pytest.mark.parametrize(
    ("name", "said"), [("recurrent_gemma", "keeps states"), ("T5ForConditionalGeneration", "for decoders")]
)
def test_models_whose_past_cannot_be_taken_back(name: str, said: str) -> None:
    case = next(case for case in covered_cases() if case.name == name)
    model = build(case, "sdpa")
    with pytest.raises(UnsupportedModel, match=said):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), custom_generate=speculative("lookahead"), max_new_tokens=4)
