"""Which columns hold prompts, and what becomes of a value."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evals.reference_model import MODEL_PATH
from hf_kvopt.offline.prompts import encode, prompt_columns

CHAT = [{"role": "user", "content": "a = 1"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.mark.parametrize(
    ("names", "column", "found"),
    [
        (["id", "prompt"], None, ["prompt"]),
        (["input_ids", "text", "messages"], None, ["messages", "text", "input_ids"]),
        (["prompt", "question"], "question", ["question"]),
    ],
)
def test_columns(names: list[str], column: str | None, found: list[str]) -> None:
    assert prompt_columns(names, column) == found


@pytest.mark.parametrize(("names", "column"), [(["id"], None), (["prompt"], "question"), ([], None)])
def test_no_column_of_prompts_is_an_error(names: list[str], column: str | None) -> None:
    with pytest.raises(ValueError, match=r"rows need a column with their prompts: expected .*, got columns"):
        prompt_columns(names, column)


def test_texts_chats_and_token_ids_become_token_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a = 1").input_ids
    assert encode(tokenizer, "a = 1") == ids
    assert encode(tokenizer, ids) == encode(None, np.array(ids)) == encode(None, tuple(ids)) == ids
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert encode(tokenizer, [{**CHAT[0], "name": None}]) == ids


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], r"a prompt is a text, a chat .* got \[\]"),
        (None, "got None"),
        ([1.5, 2.0], "got"),
        ([True], "got"),
        ({"role": "user"}, "got {'role'"),
        ([[1, 2], [3]], "got"),
    ],
)
def test_what_is_no_prompt_is_an_error(tokenizer: PreTrainedTokenizerBase, prompt: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encode(tokenizer, prompt)


def test_a_text_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="got a text that is empty"):
        encode(lambda text: {"input_ids": []}, "")  # type: ignore[arg-type]


def test_a_text_without_tokenizer_and_a_chat_without_template_are_errors(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        encode(None, "a")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="got 1 messages and a tokenizer without one"):
        encode(tokenizer, CHAT)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the messages: got TemplateError: roles must alternate"):
        encode(tokenizer, CHAT)
