"""Inputs and prefill of a call: keep our cache in use where a model drops it, and report where it is not used.

    generate ─► PreparedInputs   if the model's inputs lack the cache, it is emptied, to be filled with the whole text
             ─► CheckedPrefill   the forward over the prompt; then checks that our cache was returned and has grown

Phi-3, PhiMoE and Phi-4-multimodal recompute all keys when a text passes the length that their short rotary factors
cover: they withhold the cache, so that the forward makes a new one. An emptied one serves as well.
"""

import functools
import inspect
import logging
import zlib
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin

from hf_kvopt import compat, ranks
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.compat_ranks import text_group
from hf_kvopt.errors import CacheStateError
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.prefix.cache import PrefixSharedCache

logger = logging.getLogger(__name__)


class PreparedInputs(InstanceOverride):
    """Adds our cache to the inputs of a forward; replaces `compat.PREPARE_INPUTS` on one model."""

    adds_nothing = True  # to what a prompt's keys and values depend on

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() reads the arguments that a model takes from this signature.
        return inspect.signature(compat.original(self.module, compat.PREPARE_INPUTS))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, cache = self.module, kwargs.get(compat.CACHE_KEYWORD)
        prepare = compat.original(model, compat.PREPARE_INPUTS)
        inputs: dict[str, Any] = prepare(*args, **kwargs)
        is_dropped = all(inputs.get(name) is None for name in compat.CACHE_NAMES) and inputs.get("use_cache", True)
        if paged_part(cache) is None or not is_dropped:
            return inputs
        assert cache is not None
        if isinstance(cache, PrefixSharedCache) and cache.is_only_filled:
            # The model must not see that a part of the prompt was known: with an empty cache it feeds all of it.
            inputs = prepare(*args, **{**kwargs, compat.NEXT_LENGTH: None, compat.CACHE_KEYWORD: None})
        cache.reset()
        inputs[compat.cache_keyword(model)] = cache
        return inputs


class CheckedPrefill(InstanceOverride):
    """Calls `prefill`; replaces `compat.PREFILL` on one model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return prefill(self.module, *args, **kwargs)


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let the model read a prompt, and check that it went into our cache.

    Raises:
        CacheStateError: the cache did not grow by the tokens that were fed, so that nothing could continue from it; or
            ranks of a sharded model were given other prompts, or caches that hold another number of columns.
    """
    cache = paged_part(model_kwargs.get(compat.CACHE_KEYWORD))
    _require_alike(model, input_ids, cache)
    before, epoch = (cache.num_columns, cache.epoch) if cache is not None else (0, 0)
    outputs = compat.original(model, compat.PREFILL)(input_ids, generation_config, model_kwargs, *args, **kwargs)
    if cache is None or not cache.has_columns:
        return outputs
    returned = outputs.get(compat.CACHE_KEYWORD)
    # A cache that was emptied meanwhile holds only what was fed, which may be less than before. A model with a
    # generate() of its own may feed other columns than asked for (MusicGen's codebooks).
    is_usual = getattr(type(model), "generate", None) is GenerationMixin.generate and cache.epoch == epoch
    expected = max(before + 1, input_ids.shape[1]) if is_usual else 1
    if returned is not None and paged_part(returned) is not cache:
        _say_once(type(model).__name__, type(returned).__name__)
    elif cache.num_columns < expected:
        raise CacheStateError(
            f"{type(model).__name__} did not write the prompt into the cache that it was handed: got a cache of "
            f"{cache.num_columns} columns that held {before} before {input_ids.shape[1]} tokens were read; call "
            "hf_kvopt.disable(model), or hf_kvopt.enable(model, cache=None), and use the model's own cache"
        )
    return outputs


def _require_alike(model: PreTrainedModel, input_ids: Tensor, cache: PagedCache | None) -> None:
    """Raise CacheStateError unless all ranks of a sharded model read the same prompts into caches of one length."""
    if text_group(model) is None:
        return
    held = "no paged cache" if cache is None else f"{type(cache).__name__} of {cache.num_columns} columns"
    text = zlib.crc32(str(input_ids.tolist()).encode())
    ranks.require_alike(model, "prompts or caches", f"tokens {list(input_ids.shape)} with checksum {text:08x}, {held}")


def paged_part(cache: object) -> PagedCache | None:
    """Return the cache of this library that holds the text of `cache`, or None."""
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return cache if isinstance(cache, PagedCache) else None


@functools.cache
def _say_once(model: str, kind: str) -> None:
    logger.warning(
        "%s makes a cache of its own, a %s, and leaves the one that it is handed: right, but not in blocks", model, kind
    )
