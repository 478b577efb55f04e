"""The one-call front door: `enable(model, cache="paged")` and plain `model.generate(**inputs)` is cheap.

`enable` sets the attention and overrides, on this one instance, the method by which `generate` makes its cache;
`disable` puts both back. Nothing global changes.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.attention import mla
from hf_kvopt.attention.bound import InstanceOverride
from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.attention.support import model_traits
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.prefix import PrefixStore
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.cache.watched import require_shorter
from hf_kvopt.draft.drafter import Drafter
from hf_kvopt.draft.generate import DraftingGenerate
from hf_kvopt.draft.speculate import SpeculativeDecoding, speculative
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.overrides import CheckedPrefill, PreparedInputs
from hf_kvopt.quant import KV_FORMATS
from hf_kvopt.sharing import Sharing, SharingOverride, install, uninstall

CacheFactory = Callable[..., PagedCache]
CACHES: dict[str, CacheFactory] = {
    "paged": PagedCache,
    **{name: partial(QuantizedPagedCache, format=name) for name, fmt in KV_FORMATS.items() if not fmt.is_native},
}
KV_NAMES = {"paged": "native", **{name: name for name in CACHES if name != "paged"}}
_LAYER_OPTIONS = ("skip_layers", "layer_formats")
_STATE = "_hf_kvopt_state"


def enable(
    model: PreTrainedModel,
    cache: str | None = "paged",
    *,
    attention: bool = True,
    prefix_sharing: bool | PrefixStore = False,
    draft: "str | Drafter | PreTrainedModel | SpeculativeDecoding | None" = None,
    **cache_options: Any,
) -> PreTrainedModel:
    """Make plain `model.generate(...)` use hf_kvopt's attention and cache.

    Args:
        model: a transformers model that can generate.
        cache: "paged"; a format of `QuantizedPagedCache` ("int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4"); or None to
            keep transformers' cache.
        attention: also set `attn_implementation="hf_kvopt"`.
        prefix_sharing: compute a prompt once, across `generate` calls and inside a batch; True makes a `PrefixStore`
            of the cache's format with the options `max_tokens`, `block_size`, `skip_layers` and `layer_formats` (see
            `prefix_store(model)`), a store of this model is used as it is.
        draft: speculate in every `generate` call: a draft head, an assistant model, "prompt_lookup", "lookahead", or
            what `speculative(...)` made, with its settings and `stats`.
        cache_options: handed to the cache at each `generate` call, e.g. `block_size=32`, `max_tokens=100_000`.

    Returns:
        The model, for chaining.

    Raises:
        ValueError, TypeError: an unknown cache name, or options that the cache does not take. The model is as it was.
        UnsupportedModel: a model that chooses neither attention nor cache by transformers' interfaces, or that
            selects keys sparsely; with prefix_sharing, one whose keys and values depend on more than its tokens.

    Source: what users ask of plain `generate`, transformers issues #24841 and #34232 (prompts kept between calls),
    #32165 (speculation for batches).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"enable takes a transformers model: got {type(model).__name__}; unwrap it first, e.g. pipe.model"
        )
    if cache is not None and cache not in CACHES:
        raise ValueError(f"unknown cache {cache!r}: expected one of {sorted(CACHES)} or None")
    if cache is None and cache_options:
        raise ValueError(f"cache=None takes no options: got {sorted(cache_options)}; name a cache or drop them")
    if "config" in cache_options:
        raise TypeError("enable takes the config from the model: got config as an option of the cache; drop it")
    if "format" in cache_options:
        raise TypeError(f"enable takes the format as the cache's name: got cache={cache!r} and a format; drop one")
    compat.check()
    _check_supported(model, cache is not None, attention)
    if cache is not None:
        _make_cache(model, CACHES[cache], cache_options)  # refuse bad options now, not in the first generate
    sharing = _sharing(model, cache, prefix_sharing, cache_options)
    drafting = _drafting(model, draft)
    disable(model)
    previous = model.config._attn_implementation
    if attention:
        model.set_attn_implementation(ATTENTION_NAME)
        mla.install(model)
    # In the instance's own dict: `generate` calls the methods through self (nn.Module would file them elsewhere).
    model.__dict__[compat.PREPARE_INPUTS] = PreparedInputs(model)
    model.__dict__[compat.PREFILL] = CheckedPrefill(model)
    if cache is not None:
        make = partial(_make_cache, factory=CACHES[cache], options=cache_options)
        model.__dict__[compat.MAKE_CACHE] = _CacheMaker(model, make)
    generates = None if drafting is None else DraftingGenerate(model, drafting)
    if sharing is not None:
        model.__dict__[compat.MAKE_CACHE] = _SharedCacheMaker(model, sharing)
        install(model, sharing, generates)
    elif generates is not None:
        model.__dict__["generate"] = generates
    setattr(model, _STATE, previous)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Put back what `enable` changed; a no-op on a model that is not enabled."""
    if hasattr(model, _STATE):
        previous = getattr(model, _STATE)
        delattr(model, _STATE)
        for name in (compat.MAKE_CACHE, compat.PREPARE_INPUTS, compat.PREFILL):
            model.__dict__.pop(name, None)
        mla.uninstall(model)
        uninstall(model)
        if model.config._attn_implementation != previous:
            model.set_attn_implementation(previous)
    return model


def _drafting(model: PreTrainedModel, draft: Any) -> SpeculativeDecoding | None:
    if draft is None:
        return None
    made = draft if isinstance(draft, SpeculativeDecoding) else speculative(draft)
    made.drafter.check(model)
    return made


class _CacheMaker(InstanceOverride):
    """Make our cache where generate() would make its default one; replaces `compat.MAKE_CACHE` on one model."""

    def __init__(self, model: PreTrainedModel, make: Callable[[PreTrainedModel], Cache]) -> None:
        super().__init__(model)
        self.make = make

    def __call__(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        model, given = self.module, model_kwargs.get(compat.CACHE_KEYWORD)
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
            and compat.uses_standard_cache(model)
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
    """Raise CacheStateError where `cache` belongs to another model, or holds all of a prompt's columns already.

    Our attention sees so itself; this is for the model's own.
    """
    held, owner = int(cache.get_seq_length()), cache.owner() if cache.owner is not None else None
    if held and owner is not None and owner is not model:
        raise CacheStateError(
            f"this cache was filled by another model: got {type(model).__name__}, and a cache that holds {held} tokens "
            f"of another {type(owner).__name__}; use one cache a model, or cache.free() before handing it on"
        )
    require_shorter(held, num_columns)
    cache.owner = weakref.ref(model)


class _SharedCacheMaker(_CacheMaker, SharingOverride):
    """The same with caches of the model's prefix store."""

    def __init__(self, model: PreTrainedModel, sharing: Sharing) -> None:
        SharingOverride.__init__(self, model, sharing)

    def make(self, model: PreTrainedModel) -> Cache:
        """A blank cache of the store."""
        return self.sharing.make_cache(model)


def _sharing(
    model: PreTrainedModel, cache: str | None, prefix_sharing: bool | PrefixStore, options: dict[str, Any]
) -> Sharing | None:
    """What shares the prefixes of `model`, checked; None where nothing does."""
    if prefix_sharing is False:
        return None
    if cache is None:
        raise ValueError("prefix_sharing needs a cache of this library: got cache=None; pass cache='paged'")
    wrong = sorted(set(options) - {"max_tokens", "block_size", *_LAYER_OPTIONS})
    if wrong:
        raise TypeError(f"prefix_sharing takes max_tokens, block_size and the formats of layers: got {wrong} too")
    if isinstance(prefix_sharing, PrefixStore):
        if prefix_sharing.model is not model or options or prefix_sharing.formats.format != KV_NAMES[cache]:
            raise ValueError(
                f"prefix_sharing takes a store made from this very model, in the cache's format and with options of "
                f"its own: got cache={cache!r}, options {sorted(options)} and a store in format "
                f"{prefix_sharing.formats.format!r}; make it with PrefixStore(model, format=...)"
            )
        return Sharing(prefix_sharing, {})
    options = {**options, "format": KV_NAMES[cache]}
    PrefixStore(model, **options)  # refuse now what cannot be shared
    return Sharing(None, options)


def _make_cache(model: PreTrainedModel, factory: CacheFactory, options: dict[str, Any]) -> Cache:
    cache = factory(config=model.config.get_text_config(decoder=True), **options)
    if not model.config.is_encoder_decoder:
        return cache
    # Cross-attention sees the whole encoder, also in decoders that slide: no config, no window. Layers that are named
    # from the end are those of the decoder.
    resolved = {**options, **{name: getattr(cache.formats, name) for name in _LAYER_OPTIONS if name in options}}
    return EncoderDecoderCache(cache, factory(**resolved))


def _check_supported(model: PreTrainedModel, cache: bool, attention: bool) -> None:
    name = type(model).__name__
    traits = model_traits(type(model.config.get_text_config(decoder=True)))  # type: ignore[arg-type]
    if attention and not traits.calls_interface:
        raise UnsupportedModel(
            f"{name} has its attention written into the model: got attention=True, which cannot be chosen there; call "
            "enable(model, attention=False) to use the cache alone"
        )
    if attention and traits.selects_keys:
        raise UnsupportedModel(
            f"{name} attends to a sparse selection of keys: got attention=True, which reads all; call "
            "enable(model, attention=False) to use the cache alone"
        )
    if cache and not compat.uses_standard_cache(model):
        raise UnsupportedModel(
            f"{name} keeps its past in a cache of its own, or keeps none: got a cache that it would ignore; use the "
            "model as it is"
        )
