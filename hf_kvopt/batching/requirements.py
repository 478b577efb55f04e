"""Requirements of continuous batching on a model and a prompt, told before anything is computed."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from hf_kvopt import compat
from hf_kvopt.attention.support import attention_obstacle
from hf_kvopt.compat import model_traits
from hf_kvopt.errors import UnsupportedModel

_PACKED_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "dummy")


def require_packable(model: PreTrainedModel) -> None:
    """Raise unless rows of unlike lengths can go through a model as one packed text.

    Raises:
        TypeError: not a transformers model.
        UnsupportedModel: a model whose tokens depend on more than the tokens before them and their positions, or whose
            attention is its own.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"a batcher takes a transformers model: got {type(model).__name__}; unwrap it first, e.g. pipe.model"
        )
    compat.check()
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be batched continuously: got a model that {obstacle}; use model.generate, "
            "with enable(model) for its cache"
        )


def _obstacle(model: PreTrainedModel) -> str | None:
    """Say why a model cannot be packed, as the end of a sentence."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "has an encoder, whose output its tokens depend on"
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        return "generates in a way of its own"
    if not compat.uses_standard_cache(type(model), model.config):
        return "keeps its past in a cache of its own, or keeps none"
    windows = {options.get("sliding_window") for options in compat.layer_types(config)[1]}
    if windows != {None} and not model_traits(type(config)).masks_windows:  # type: ignore[arg-type]
        return "leaves it to its cache to hide what lies behind a window, so that its tokens depend on how they come in"
    kinds = sorted(set(compat.layer_types(config)[0]) - set(_PACKED_KINDS))
    if kinds:
        return f"has layers of kind {', '.join(kinds)}, whose states sum up one text and take no packed one"
    if compat.appended_layers(config):
        return "passes through its layers several times, with a cache that grows while it does"
    scaled = sorted(compat.length_dependent_rope(config))
    if scaled:
        return f"has rotary scaling of type {', '.join(scaled)}, by which tokens depend on the longest row of a batch"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no position_ids, so that it counts positions through the packed text"
    if compat.is_synced(model):
        return "is sharded so that all ranks must run equally many forwards"
    return attention_obstacle(model)


def as_prompt(model: PreTrainedModel, input_ids: Any) -> list[int]:
    """The token ids of one prompt.

    Raises:
        TypeError, ValueError: not the tokens of one text, none at all, or ids that the model has no embedding of.
    """
    ids = input_ids if isinstance(input_ids, Tensor) else _tensor_of(input_ids)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"a request has one prompt, [length] or [1, length]: got ids of shape {list(ids.shape)}")
    if not len(ids):
        raise ValueError("a prompt needs at least one token: got none; begin with the tokenizer's bos token")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"a prompt is token ids: got {ids.dtype}")
    prompt: list[int] = ids.tolist()
    size = vocab_size(model)
    if not 0 <= min(prompt) <= max(prompt) < size:
        raise ValueError(f"token ids must be from 0 to {size - 1}: got {min(prompt)} to {max(prompt)}")
    return prompt


def vocab_size(model: PreTrainedModel) -> int:
    """Tokens that a model has an embedding of."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _tensor_of(input_ids: Any) -> Tensor:
    if isinstance(input_ids, str):
        raise TypeError("a prompt is token ids: got text; pass tokenizer(text).input_ids")
    if not isinstance(input_ids, Sequence) and not hasattr(input_ids, "__array__"):
        raise TypeError(f"a prompt is token ids, as a list or tensor: got {type(input_ids).__name__}")
    try:
        return torch.as_tensor(input_ids if len(input_ids) else torch.empty(0, dtype=torch.long))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"a prompt is token ids, as a list or tensor: got {input_ids!r:.80}") from error


def num_positions(model: PreTrainedModel) -> int | None:
    """Length of the longest text, where the model looks positions up in a table; None where it computes them."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    tables = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or "wpe" in name.split("."))
    ]  # fmt: skip
    return longest if tables else None


def require_counts(**counts: Any) -> None:
    """Raise ValueError for a number that is none of things to count, of which there is at least one."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1: got {value!r}")


def require_seed(seed: int | None) -> None:
    """Raise TypeError or ValueError for what seeds no generator."""
    if seed is None:
        return
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, or None to draw one: got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits: got {seed}")
