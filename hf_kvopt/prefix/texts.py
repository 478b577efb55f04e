"""Prompts and answers as lists of tokens: what a prefix store files keys and values under."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    for count, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return count
    return min(len(a), len(b))


def texts_of(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[list[list[int]], list[int]]:
    """The tokens of each row without its padding, and how many pads stand before them.

    Raises:
        ValueError: not two-dimensional, a mask of another shape or other numbers than ones and zeros, padding that is
            not on the left, or an empty row.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise ValueError(
            f"input_ids must be token ids [batch, length]: got {input_ids.dtype} {list(input_ids.shape)}; add the "
            "batch dimension, e.g. input_ids[None]"
        )
    if attention_mask is None:
        return input_ids.tolist(), [0] * len(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids: got {list(attention_mask.shape)} for "
            f"{list(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if bool((attention_mask != mask).any()):
        raise ValueError(
            "attention_mask must hold ones and zeros: got other numbers, by which generate() counts other positions; "
            "pass attention_mask.bool()"
        )
    pads = (~mask).sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not bool((mask == (columns >= pads[:, None])).all()) or bool((pads == mask.shape[1]).any()):
        raise ValueError(
            "rows must be padded on the left alone and hold a token: got another attention_mask; tokenize with "
            "padding_side='left'"
        )
    counts = pads.tolist()
    return [row[pad:] for row, pad in zip(input_ids.tolist(), counts, strict=True)], counts


def require_mask(model: PreTrainedModel | None, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError where `generate` would take pad tokens for padding where no mask says otherwise."""
    generation = getattr(model, "generation_config", None)
    pad = getattr(generation, "pad_token_id", None)
    if attention_mask is None and pad is not None and bool((input_ids == pad).any()):
        raise ValueError(
            f"input_ids hold the pad token {pad}: got no attention_mask, so that nobody can tell padding from "
            "text; pass the one that generate() gets"
        )


def as_text(input_ids: Tensor | Sequence[int]) -> list[int]:
    """One text, as a list."""
    ids = input_ids if isinstance(input_ids, Tensor) else torch.tensor(list(input_ids), dtype=torch.long)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"one text is expected, [length] or [1, length]: got {list(ids.shape)}")
    text: list[int] = ids.tolist()
    return text


def end_tokens(model: PreTrainedModel | None) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def until(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first token that ends a text; what follows is padding."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
