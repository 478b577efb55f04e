"""Streamers and stop strings, which generate() does not pass on: bound by the factory, and by `enable`."""

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_kvopt import disable, enable, speculative
from tests.helpers import VOCAB, eager_tokens, generate, prompt, tiny_model
from tests.speculation.drafters import noisy
from tests.speculation.test_verify import small

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]


class Collected:
    """Streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.is_ended = True


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the i-th byte character."""
    made = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(ALPHABET)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_streamer_sees_the_prompt_and_then_every_token_once() -> None:
    streamer: Any = Collected()
    wanted = eager_tokens("full", 9, max_new_tokens=20)
    spec = speculative(noisy(), gamma=4, fallback=False, streamer=streamer)
    assert torch.equal(generate(tiny_model(), prompt(9), custom_generate=spec, max_new_tokens=20), wanted)
    assert streamer.is_ended
    assert streamer.pieces[0] == wanted[0, :9].tolist()
    assert [token for piece in streamer.pieces for token in piece] == wanted[0].tolist()
    assert max(map(len, streamer.pieces[1:])) > 1


def test_stop_strings_end_a_row_where_plain_decoding_ends() -> None:
    plain = eager_tokens("full", 9, max_new_tokens=20)[0].tolist()
    stop = ALPHABET[plain[15]] + ALPHABET[plain[16]]
    options = {"max_new_tokens": 20, "eos_token_id": 96, "pad_token_id": 0}
    tok = tokenizer()
    wanted = generate(tiny_model("full", "eager"), prompt(9), None, stop_strings=[stop], tokenizer=tok, **options)
    spec = speculative(noisy(), gamma=4, fallback=False, stop_strings=[stop], tokenizer=tok)
    got = generate(tiny_model(), prompt(9), custom_generate=spec, **options)
    assert torch.equal(got, wanted)
    assert got.shape[1] < 9 + 20


def test_an_assistant_whose_tokenizer_has_more_tokens_than_the_model_is_refused() -> None:
    other = tokenizer()
    other.add_tokens(["\u4e00"])
    with pytest.raises(ValueError, match="must be that of the assistant: got 98 tokens for a model of 97"):
        speculative(noisy().model, tokenizer=tokenizer(), assistant_tokenizer=other)


def test_an_enabled_model_speculates_in_plain_generate() -> None:
    model, streamer = tiny_model(attention="eager"), Collected()
    spec = speculative(noisy(), gamma=4, fallback=False)
    enable(model, draft=spec)
    wanted = eager_tokens("full", 9, max_new_tokens=20)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(**prompt(9), streamer=streamer, **options), wanted)
    assert streamer.is_ended
    assert spec.stats.calls == 1
    assert torch.equal(model.generate(**prompt(9, 6), **options), eager_tokens("full", 9, 6, max_new_tokens=20))
    assert spec.stats.calls == 2
    with pytest.raises(ValueError, match="num_beams=2"):
        model.generate(**prompt(9), num_beams=2, **options)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**prompt(9), **options), wanted)
    disable(model)
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**prompt(9), **options), wanted)


def test_enabling_refuses_what_cannot_draft_and_changes_nothing() -> None:
    model = tiny_model(attention="eager")
    before = set(vars(model))
    for draft, said in ((small(0), "vocabularies of 97"), ("lookback", "expected one of")):
        with pytest.raises(ValueError, match=said):
            enable(model, draft=draft)
    assert set(vars(model)) == before
