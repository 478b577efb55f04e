"""A text to measure on that is on every machine: Python's manual, by the tokenizer beside a model's weights."""

from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_kvopt.errors import KVOptError

ROWS, TOKENS = 2, 512


def text_ids(
    model: PreTrainedModel,
    text: str | None = None,
    rows: int = ROWS,
    tokens: int = TOKENS,
) -> Tensor:  # [rows, tokens] int64
    """Return rows of a text, evenly spread, each behind the start token where the tokenizer has one.

    Args:
        model: whose `name_or_path` a tokenizer is loaded from.
        text: what to read; None for topics of Python's manual, prose with code.

    Raises:
        KVOptError: there is no tokenizer, or the text is too short.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise KVOptError(
            f"calibrate needs a text, and a tokenizer for it: got none at {model.name_or_path!r}; pass "
            "hf_kvopt.calibrate(model, ids), with at least 256 tokens a row"
        ) from error
    source = "\n".join(topics[name] for name in sorted(topics)) if text is None else text
    first = tokenizer.bos_token_id
    width = tokens - (first is not None)
    # Tokens are hardly ever shorter than a character.
    found = tokenizer(source[: 40 * rows * tokens], add_special_tokens=False, verbose=False)["input_ids"]
    if len(found) < rows * width:
        raise KVOptError(f"the text must hold at least {rows * width} tokens: got {len(found)}; use a longer one")
    starts = [row * (len(found) - width) // max(1, rows - 1) for row in range(rows)]
    start = [] if first is None else [first]
    return torch.tensor([start + found[begin : begin + width] for begin in starts])
