"""Prompts of rows: texts, chats or token ids of one column, as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

COLUMNS = ("messages", "prompt", "text", "input_ids")
"""Columns that are looked for, in this order, where none is named."""


def prompt_columns(names: Sequence[str], column: str | None = None) -> list[str]:
    """Return the columns that hold prompts; the prompt of a row is the first of them that is not None.

    Args:
        names: the columns there are.
        column: the one that was asked for; None takes those of `COLUMNS` that are there.

    Raises:
        ValueError: there is no such column.
    """
    wanted = COLUMNS if column is None else (column,)
    found = [name for name in wanted if name in names]
    if not found:
        raise ValueError(
            f"rows need a column with their prompts: expected {' or '.join(map(repr, wanted))}, got columns "
            f"{sorted(names)}; name it with column="
        )
    return found


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: Any) -> list[int]:
    """Return the token ids of one prompt.

    Args:
        tokenizer: of the model; token ids need none.
        prompt: a text, a chat (messages with "role" and "content", for the tokenizer's chat template), or token ids.

    Raises:
        ValueError: the prompt is none of these, it is empty, or the tokenizer lacks what it needs.
    """
    if isinstance(prompt, str):
        return _ids(_required(tokenizer, "a text")(prompt), "a text")
    if not isinstance(prompt, Sequence) and hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and len(prompt):
        if all(isinstance(message, Mapping) for message in prompt):
            return _chat(_required(tokenizer, "a chat"), prompt)
        if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return list(prompt)
    raise ValueError(
        "a prompt is a text, a chat (messages with role and content) or token ids, with one of them at least: got "
        f"{prompt!r:.80}"
    )


def _chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"a chat needs a chat template: got {len(messages)} messages and a tokenizer without one; write "
            "the prompts as texts"
        )
    kept = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        return _ids(tokenizer.apply_chat_template(kept, add_generation_prompt=True, return_dict=True), "a chat")
    except Exception as error:  # templates raise what they like, jinja's own errors for the rest
        raise ValueError(f"the chat template refuses the messages: got {type(error).__name__}: {error}") from error


def _ids(encoded: Any, what: str) -> list[int]:
    ids = list(encoded["input_ids"])
    if not ids:
        raise ValueError(f"a prompt needs at least one token: got {what} that is empty")
    return ids


def _required(tokenizer: PreTrainedTokenizerBase | None, what: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(f"{what} needs a tokenizer: got tokenizer=None; pass the model's, or token ids as prompts")
    return tokenizer
