"""Assistants: drafts that end where the assistant is unsure, and drafts of another tokenizer."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_kvopt
from tests.helpers import eager_tokens, prompt, tiny_model

NEW = 16


def drafted(threshold: float | None, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    assistant = tiny_model()
    assistant.generation_config.assistant_confidence_threshold = threshold
    spec = hf_kvopt.speculative(assistant, gamma=4, fallback=False)
    got = tiny_model().generate(**prompt(9, 6), custom_generate=spec, max_new_tokens=NEW, do_sample=False, **kwargs)
    return got, spec.stats


@pytest.mark.parametrize("threshold", [None, 0.0, 0.02, 1.0])
def test_a_threshold_changes_no_token(threshold: float | None) -> None:
    got, stats = drafted(threshold)
    assert torch.equal(got, eager_tokens("full", 9, 6, max_new_tokens=NEW))
    assert stats.steps > 0


def test_a_draft_ends_behind_the_first_token_that_is_not_sure() -> None:
    # Nothing is certain to a random model, so each draft is one token; without a threshold all four are right.
    assert len([n for n in drafted(1.0)[1].accepted_by_depth if n]) == 1
    assert len([n for n in drafted(None)[1].accepted_by_depth if n]) == 4


def words(order: list[int]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose word `order[i]` has the id i."""
    made = Tokenizer(models.WordLevel({f"w{word}": i for i, word in enumerate(order)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def letters(order: list[int]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, not all of which are text by themselves, in some order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={alphabet[letter]: i for i, letter in enumerate(order)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def renumbered() -> tuple[PreTrainedModel, list[int]]:
    """Return the tiny model with its tokens in another order, and this order."""
    model = tiny_model()
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = embed is head
    embed.data = embed.data[order]
    if not is_tied:
        head.data = head.data[order]
    return model, order.tolist()


@pytest.mark.parametrize("lengths", [(9,), (9, 1, 14)], ids=["batch 1", "batch 3"])
@pytest.mark.parametrize("tokenizer", [words, letters])
@pytest.mark.parametrize("threshold", [None, 0.03])
def test_an_assistant_of_another_tokenizer_gives_the_tokens_of_plain_decoding(
    lengths: tuple[int, ...], tokenizer: Any, threshold: float | None
) -> None:
    wanted = eager_tokens("full", *lengths, max_new_tokens=NEW)
    assistant, order = renumbered()
    assistant.generation_config.assistant_confidence_threshold = threshold
    spec = hf_kvopt.speculative(
        assistant, gamma=4, fallback=False, tokenizer=tokenizer(list(range(97))), assistant_tokenizer=tokenizer(order)
    )
    for kwargs in ({"do_sample": False}, {"do_sample": True, "top_k": 1}):
        got = tiny_model().generate(**prompt(*lengths), custom_generate=spec, max_new_tokens=NEW, **kwargs)
        assert torch.equal(got, wanted)
    if tokenizer is words and threshold is None:
        assert spec.stats.steps <= 2 * 5  # every draft is right: two calls, five tokens a step


def test_an_assistant_of_another_tokenizer_follows_rows_that_end() -> None:
    text = eager_tokens("full", 9, 6, 14, max_new_tokens=NEW)
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": int(text[1, -9]), "pad_token_id": 0}
    wanted = eager_tokens("full", 9, 6, 14, **options)
    assistant, order = renumbered()
    spec = hf_kvopt.speculative(
        assistant, gamma=3, fallback=False, tokenizer=words(list(range(97))), assistant_tokenizer=words(order)
    )
    got = tiny_model().generate(**prompt(9, 6, 14), custom_generate=spec, do_sample=False, **options)
    assert torch.equal(got, wanted)


def test_plain_generate_of_an_enabled_model_takes_an_assistant_of_another_tokenizer() -> None:
    model = tiny_model()
    hf_kvopt.enable(model, draft="suffix")
    assistant, order = renumbered()
    assistant.resize_token_embeddings(100, mean_resizing=False)  # the sizes tell transformers that they differ
    tokenizers = {"tokenizer": letters(list(range(97))), "assistant_tokenizer": letters(order)}
    got = model.generate(**prompt(9), assistant_model=assistant, max_new_tokens=NEW, do_sample=False, **tokenizers)
    assert torch.equal(got, eager_tokens("full", 9, max_new_tokens=NEW))
