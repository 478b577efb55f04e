"""The prompt of a speculative call: read by the target as generate() would, and told to the drafter without padding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.draft.drafter import Read
from hf_kvopt.draft.reader import Reader
from hf_kvopt.draft.reads import features_of, packed


class Prefilled(NamedTuple):
    """The target after the prompt."""

    reader: Reader
    outputs: Any
    prompt: Read  # `following` lacks each row's last token, which is not sampled yet


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,  # [batch, length]
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    cache: PagedCache,
    feature_layers: tuple[int, ...],
    takes_positions: bool,
) -> Prefilled:
    """Let the target read what `cache` lacks of the prompt.

    Raises:
        ValueError: the drafter needs hidden states, and the target returns none.
    """
    if feature_layers:
        model_kwargs = {**model_kwargs, "output_hidden_states": True}
    outputs = getattr(model, compat.PREFILL)(input_ids, config, model_kwargs)
    features = features_of(outputs, feature_layers)
    columns = int(cache.get_seq_length())
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is None:
        mask = input_ids.new_ones(len(input_ids), columns)
    if positions is None or positions.shape[-1] < input_ids.shape[1]:
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    padding = mask.bool()
    offsets = (positions[:, -1] + 1 - columns).tolist()
    reader = Reader(
        model, cache, [columns] * len(input_ids), None if bool(padding.all()) else padding, offsets, takes_positions
    )
    # Features were computed for what the cache lacked; other drafters are told all the text that there is.
    width = input_ids.shape[1] if features is None else features.shape[1]
    return Prefilled(
        reader, outputs, _told(input_ids[:, -width:], padding[:, -width:], positions[:, -width:], features)
    )


def _told(ids: Tensor, is_real: Tensor, positions: Tensor, features: Tensor | None) -> Read:
    """The last columns of the prompt, each row without its padding."""
    nodes = [row.nonzero()[:, 0].tolist() or [ids.shape[1] - 1] for row in is_real.cpu()]
    texts = [row[columns].tolist() for row, columns in zip(ids.cpu(), nodes, strict=True)]
    read = packed(ids, [[*text[1:], 0] for text in texts], nodes, [0] * len(ids), features, None)
    index = torch.tensor([row + [0] * (read.tokens.shape[1] - len(row)) for row in nodes], device=ids.device)
    return read._replace(positions=positions.expand(len(ids), -1).gather(1, index))
