"""Prefill of a speculative call: the target reads the prompt as in generate(), the drafter gets it unpadded."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.speculation.drafters.base import Read
from hf_kvopt.speculation.loop.reader import Reader, require_grown
from hf_kvopt.speculation.loop.reads import features_of, packed

# Inputs that the reader feeds itself, or that do not concern the tokens.
_OWN_INPUTS = (
    *compat.CACHE_NAMES, "input_ids", "attention_mask", "position_ids", "cache_position", "use_cache",
    "logits_to_keep", "num_logits_to_keep", "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip


class Prefilled(NamedTuple):
    """State of the target after the prompt."""

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
    """Let the target read the part of the prompt that `cache` lacks.

    Raises:
        ValueError: the drafter needs hidden states, and the target returns none.
        UnsupportedModel: the target did not write the prompt to `cache`, or takes inputs that change by token.
    """
    if feature_layers:
        model_kwargs = {**model_kwargs, "output_hidden_states": True}
    columns = prompt_columns(input_ids, config, model_kwargs, int(cache.get_seq_length()))
    outputs = getattr(model, compat.PREFILL)(input_ids, config, model_kwargs)
    require_grown(model, cache, columns)
    features = features_of(outputs, feature_layers)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is None:
        mask = input_ids.new_ones(len(input_ids), columns)
    if positions is None or positions.shape[-1] < input_ids.shape[1]:
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    padding, positions = mask.bool(), positions.expand(len(input_ids), -1)
    offsets = (positions[:, -1] + 1 - columns).tolist()
    reader = Reader(
        model,
        cache,
        [columns] * len(input_ids),
        None if bool(padding.all()) else padding,
        offsets,
        input_ids.device,
        takes_positions,
        steady_inputs(model, input_ids, outputs, {**model_kwargs, compat.cache_keyword(model): cache}),
    )
    # Features exist only for what the cache lacked; drafters without features get the whole text.
    width = input_ids.shape[1] if features is None else min(features.shape[1], input_ids.shape[1])
    features = None if features is None else features[:, -width:]
    ids = input_ids.to(reader.device)
    told = _told(ids[:, -width:], padding[:, -width:], positions[:, -width:].to(reader.device), features)
    return Prefilled(reader, outputs, told)


def prompt_columns(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], held: int) -> int:
    """Return the columns of a cache that holds `held` once the prompt is read into it."""
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None:
        return int(embeds.shape[1])
    # Either the whole text, whose held part is skipped, or only its continuation, with a mask over all.
    is_whole = compat.prompt_columns(config, model_kwargs.get("attention_mask")) == input_ids.shape[1]
    return input_ids.shape[1] if is_whole else held + input_ids.shape[1]


def steady_inputs(
    model: PreTrainedModel, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the inputs besides tokens, mask and positions that plain decoding would feed at every step.

    Raises:
        UnsupportedModel: an input that is not known for drafted tokens.
    """
    inputs = compat.next_inputs(model, input_ids, outputs, model_kwargs)
    steady: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in _OWN_INPUTS or value is None:
            continue
        is_of_token = name in compat.TOKEN_TYPES and isinstance(value, Tensor) and value.shape == (len(input_ids), 1)
        if not is_of_token and not isinstance(value, bool | int | float | str):
            raise UnsupportedModel(
                f"speculation feeds several tokens at once: got {name}, of which plain decoding makes another for each "
                f"step of {type(model).__name__}; drop {name}, or generate without custom_generate"
            )
        steady[name] = value
    return steady


def _told(ids: Tensor, is_real: Tensor, positions: Tensor, features: Tensor | None) -> Read:
    """Return the last columns of the prompt, each row without its padding."""
    nodes = [row.nonzero()[:, 0].tolist() or [ids.shape[1] - 1] for row in is_real.cpu()]
    texts = [row[columns].tolist() for row, columns in zip(ids.cpu(), nodes, strict=True)]
    read = packed(ids, [[*text[1:], 0] for text in texts], nodes, [0] * len(ids), features, None)
    index = torch.tensor([row + [0] * (read.tokens.shape[1] - len(row)) for row in nodes], device=ids.device)
    return read._replace(positions=positions.expand(len(ids), -1).gather(1, index))
