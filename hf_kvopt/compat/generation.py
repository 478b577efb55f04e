"""Arguments of a running generate(), and the inputs of its next step."""

import sys
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationConfig
from transformers.generation import utils as generation_utils

from hf_kvopt.compat.names import CACHE_NAMES, NEXT_KWARGS, PREPARE_INPUTS, find

_is_zero3 = find(generation_utils, "is_deepspeed_zero3_enabled")
_is_fsdp = find(generation_utils, "is_fsdp_managed_module")
GENERATE_LOCALS = ("input_ids", "generation_config", "model_kwargs")


class Call(NamedTuple):
    """A generate() call that was given a cache."""

    config: GenerationConfig  # of this call alone
    columns: int  # that the prompt has, with what the cache holds of it; -1: unknown
    num_ids: int  # columns of the tokens that were passed
    ids: Tensor | None = None  # those
    mask: Tensor | None = None  # the attention mask that was passed, or made

    @property
    def longest(self) -> int:
        """Columns that a cache may hold at the end: the last token is not read. 0: unknown."""
        limit = self.config.max_length
        if self.columns < 0 or not self.num_ids or limit is None:
            return 0
        return max(self.columns, self.num_ids) + limit - self.num_ids - 1


def running_call(cache: Cache) -> Call | None:
    """Return the generate() call in this thread that `cache` was given to, alone or as part of a pair.

    What it was asked for is told neither to the cache nor, by most models, to the attention: its own frame is read.
    """
    known = _generate_locals()
    if known is None:
        return None
    config, kwargs = known["generation_config"], known["model_kwargs"]
    given = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    if isinstance(given, EncoderDecoderCache):
        is_given = given.self_attention_cache is cache or given.cross_attention_cache is cache
        return Call(config, -1, 0) if is_given else None
    mask, ids = kwargs.get("attention_mask"), known["input_ids"]
    return Call(config, prompt_columns(config, mask), ids.shape[1], ids, mask) if given is cache else None


def _generate_locals() -> dict[str, Any] | None:
    """Return the local names of the innermost generate() that runs in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Of any class: some models bring a generate() of their own.
        known = frame.f_locals if frame.f_code.co_name == "generate" else {}
        if all(name in known for name in GENERATE_LOCALS):
            return known
        frame = frame.f_back
    return None


def next_inputs(
    model: PreTrainedModel, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return what plain decoding would feed `model` for the token behind `input_ids`, which was read with `outputs`."""
    updated = getattr(model, NEXT_KWARGS)(outputs, dict(model_kwargs), is_encoder_decoder=False)
    longer = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
    inputs: dict[str, Any] = getattr(model, PREPARE_INPUTS)(longer, next_sequence_length=1, **updated)
    return inputs


def is_synced(model: PreTrainedModel) -> bool:
    """Return whether the ranks of a sharded model must run equally many forwards, as found or as told."""
    if (_generate_locals() or {}).get("synced_gpus"):
        return True
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    return bool(_is_zero3() or _is_fsdp(model))


def prompt_columns(config: GenerationConfig, attention_mask: Tensor | None) -> int:
    """Return the columns that the prompt's mask covers, also where generate() dropped an all-ones mask; -1: unknown."""
    return int(getattr(config, "_mask_length", None) or -1) if attention_mask is None else attention_mask.shape[1]


def pad_token(config: GenerationConfig) -> int:
    """Return the token that fills rows which ended, 0 where there is none."""
    pad = getattr(config, "_pad_token_tensor", None)
    if pad is None:
        pad = config.pad_token_id
    return 0 if pad is None else int(pad)
