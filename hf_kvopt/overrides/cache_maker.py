"""The cache that plain `generate()` makes for one model, by name, in place of transformers' default one."""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Self

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.attention.checks import check_weights
from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.cache.bounded import require_decoder
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.cache.watched import require_shorter
from hf_kvopt.errors import CacheStateError
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.quant import KV_FORMATS, NATIVE, is_pair

CacheFactory = Callable[..., PagedCache]
CACHES: dict[str, CacheFactory] = {
    "paged": PagedCache,
    **{name: partial(QuantizedPagedCache, format=name) for name, fmt in KV_FORMATS.items() if not fmt.is_native},
}
LAYER_OPTIONS = ("skip_layers", "layer_formats")


def factory_of(name: object) -> CacheFactory | None:
    """Return what makes the cache called `name`, one of `CACHES` or a pair of formats; None for any other."""
    if isinstance(name, str) and is_pair(name):
        return partial(QuantizedPagedCache, format=name)
    return CACHES.get(name) if isinstance(name, str) else None


def format_of_cache(name: str) -> str:
    """Return the format that a cache called `name` stores keys and values in."""
    return NATIVE.name if name == "paged" else name


def make_cache(model: PreTrainedModel, factory: CacheFactory, options: dict[str, Any]) -> Cache:
    """Make a cache with `factory` for `model`; for an encoder-decoder, one for each of its two attentions."""
    if model.config.is_encoder_decoder:
        require_decoder(options.get("policy"), model.config, [])
    cache = factory(config=model.config.get_text_config(decoder=True), **options)
    if not model.config.is_encoder_decoder:
        return cache
    # Cross-attention sees the whole encoder, also in decoders that slide, so its cache gets no config and no window.
    # Layers named from the end are those of the decoder.
    resolved = {**options, **{name: getattr(cache.formats, name) for name in LAYER_OPTIONS if name in options}}
    return EncoderDecoderCache(cache, factory(**resolved))


class CacheMaker(InstanceOverride):
    """Makes our cache where generate() would make its default one; replaces `compat.MAKE_CACHE` on one model."""

    def __init__(self, model: PreTrainedModel, make: Callable[[PreTrainedModel], Cache]) -> None:
        super().__init__(model)
        self.make = make

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin.make = copy.deepcopy(self.make, memo)  # a bound method of the twin's own prefix store
        return twin

    def __call__(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        model, given = self.module, model_kwargs.get(compat.CACHE_KEYWORD)
        if model.config._attn_implementation == ATTENTION_NAME:
            check_weights(generation_config.output_attentions)
        if generation_config.use_cache is False and isinstance(given, PagedCache):
            raise CacheStateError(
                "use_cache=False with a cache passed in feeds the whole text again at every step: got both; drop "
                f"use_cache=False or {compat.CACHE_KEYWORD}"
            )
        if isinstance(given, PagedCache) and not generation_config.is_assistant:
            _check_given(model, given, compat.prompt_columns(generation_config, model_kwargs.get("attention_mask")))
        is_ours_to_make = (
            given is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
        )
        if not is_ours_to_make:
            make_default = compat.original(model, compat.MAKE_CACHE)
            make_default(generation_config, model_kwargs, *args, **kwargs)
            return
        cache = self.make(model)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[compat.CACHE_KEYWORD] = cache


def _check_given(model: PreTrainedModel, cache: PagedCache, num_columns: int) -> None:
    """Raise CacheStateError if `cache` belongs to another model, or already holds all columns of a prompt.

    Our attention detects both itself; this check serves the model's own attention.
    """
    held, owner = int(cache.get_seq_length()), cache.owner() if cache.owner is not None else None
    if held and owner is not None and owner is not model:
        raise CacheStateError(
            f"this cache was filled by another model: got {type(model).__name__}, and a cache that holds {held} tokens "
            f"of another {type(owner).__name__}; use one cache a model, or cache.free() before handing it on"
        )
    require_shorter(held, num_columns)
    cache.owner = weakref.ref(model)
