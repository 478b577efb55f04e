"""The one-call front door: `enable(model, cache="paged")` and plain `model.generate(**inputs)` is cheap.

`enable` sets the attention and overrides, on this one instance, the method by which `generate` makes its cache;
`disable` puts both back. Nothing global changes, but that torch's optimizers tell prefix stores of their steps.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.attention import mla
from hf_kvopt.attention.guards import check_weights
from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.attention.support import attention_obstacle
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache, option_names
from hf_kvopt.cache.watched import require_shorter
from hf_kvopt.errors import CacheStateError, UnsupportedModel, nearest
from hf_kvopt.overrides.inputs import CheckedPrefill, PreparedInputs
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.overrides.sharing import Sharing, SharingOverride, install
from hf_kvopt.overrides.speculation import DraftingGenerate
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.quant import KV_FORMATS
from hf_kvopt.speculation.drafters.base import Drafter
from hf_kvopt.speculation.speculative import SpeculativeDecoding, speculative

logger = logging.getLogger(__name__)

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
    attention: bool | None = None,
    prefix_sharing: bool | PrefixStore = False,
    draft: "str | Path | Drafter | PreTrainedModel | SpeculativeDecoding | None" = None,
    **cache_options: Any,
) -> PreTrainedModel:
    """Make plain `model.generate(...)` use hf_kvopt's attention and cache.

    Args:
        model: a transformers model that can generate.
        cache: "paged"; a format of `QuantizedPagedCache` ("int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4"); or None to
            keep transformers' cache.
        attention: whether to set `attn_implementation="hf_kvopt"` too. None does so where the model takes it; where it
            does not (its attention is written into the model, or selects keys sparsely), the model's own attention is
            used with this cache, which is said once.
        prefix_sharing: compute a prompt once, across `generate` calls and inside a batch; True makes a `PrefixStore`
            of the cache's format with the options `max_tokens`, `block_size`, `skip_layers` and `layer_formats` (see
            `prefix_store(model)`), a store of this model is used as it is. Weights, adapters and hooks may change
            between calls; what changes unseen (see `PrefixStore`) needs `prefix_store(model).clear()`.
        draft: speculate in every `generate` call: a draft head, its folder, an assistant model, "prompt_lookup",
            "lookahead", or what `speculative(...)` made, with its settings and `stats`.
        cache_options: handed to the cache at each `generate` call, e.g. `block_size=32`, `max_tokens="32k"`.

    Returns:
        The model, for chaining.

    Raises:
        ValueError, TypeError: an unknown cache name, or options that the cache does not take. The model is as it was.
        UnsupportedModel: a model that keeps its past in a cache of its own; with attention=True, one that does not
            take this attention; with prefix_sharing, one whose keys and values depend on more than its tokens.

    Source: what users ask of plain `generate` in transformers' issues: prompts kept between calls (#24841, #34232),
    speculation for batches (#32165).

    Examples:
        >>> model = enable(model, cache="int8", prefix_sharing=True)
        >>> output = model.generate(**inputs)
        >>> model = disable(model)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"enable takes a transformers model: got {type(model).__name__}; unwrap it first, e.g. pipe.model"
        )
    if cache is not None and cache not in CACHES:
        raise ValueError(f"unknown cache {cache!r}: expected one of {sorted(CACHES)} or None{nearest(cache, CACHES)}")
    _check_options(cache, cache_options)
    if cache is None and cache_options:
        raise ValueError(f"cache=None takes no options: got {sorted(cache_options)}; name a cache or drop them")
    compat.check()
    if cache is not None and not compat.uses_standard_cache(type(model), model.config):
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its past in a cache of its own, or keeps none: got a cache that it would "
            "ignore; use the model as it is"
        )
    attention = _takes_attention(model, attention, is_all=cache is None and draft is None)
    if cache is not None:
        _make_cache(model, CACHES[cache], cache_options)  # refuse bad options now, not in the first generate
    sharing = _sharing(model, cache, prefix_sharing, cache_options)
    drafting = _drafting(model, draft)
    disable(model)
    _require_unreplaced(model, "generate" if sharing is not None or drafting is not None else None)
    previous = model.config._attn_implementation
    if attention:
        model.set_attn_implementation(ATTENTION_NAME)
        mla.install(model)
    # In the instance's own dict: `generate` calls the methods through self (nn.Module would file them elsewhere).
    if compat.PREPARE_INPUTS not in model.__dict__:  # another library's, such as PEFT's soft prompts, stays
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
        for name in (compat.MAKE_CACHE, compat.PREPARE_INPUTS, compat.PREFILL, "generate"):
            if isinstance(model.__dict__.get(name), InstanceOverride):
                del model.__dict__[name]
        mla.uninstall(model)
        if model.config._attn_implementation != previous:
            model.set_attn_implementation(previous)
    return model


def _require_unreplaced(model: PreTrainedModel, extra: str | None) -> None:
    """Refuse where another library replaced a method on this instance that is to be replaced now."""
    for name in (compat.MAKE_CACHE, compat.PREFILL, extra):
        if name in model.__dict__:
            raise UnsupportedModel(
                f"{type(model).__name__}.{name} was replaced on this instance: got {model.__dict__[name]!r}, which "
                "enable would hide; call enable first and replace the method after it, or take the replacement off"
            )


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


def _check_options(cache: str | None, options: dict[str, Any]) -> None:
    """Refuse options that neither `enable` nor the cache knows; the likeliest name is suggested."""
    if "config" in options:
        raise TypeError("enable takes the config from the model: got config as an option of the cache; drop it")
    if "format" in options:
        raise TypeError(f"enable takes the format as the cache's name: got cache={cache!r} and a format; drop one")
    own = {
        name for name, parameter in inspect.signature(enable).parameters.items() if parameter.kind.name != "VAR_KEYWORD"
    }
    known = (own - {"model"}) | option_names(PagedCache if cache == "paged" else QuantizedPagedCache) - {"format"}
    for name in options:
        if name not in known:
            raise TypeError(
                f"enable takes no option {name!r} with cache={cache!r}: expected one of {sorted(known)}"
                f"{nearest(name, known)}"
            )


def _takes_attention(model: PreTrainedModel, wanted: bool | None, is_all: bool) -> bool:
    """Whether to set our attention; a user is told once where the model does not take it, or refused.

    Args:
        wanted: what the user said, None for nothing.
        is_all: whether nothing else would change.
    """
    obstacle = None if wanted is False else attention_obstacle(model)
    if obstacle is None:
        return wanted is not False
    if wanted or is_all:
        raise UnsupportedModel(
            f"{type(model).__name__} {obstacle}: got {'attention=True' if wanted else 'cache=None'}; call "
            "enable(model), which takes the model's own attention with this cache"
        )
    _say_once(type(model).__name__, obstacle)
    return False


@functools.cache
def _say_once(name: str, obstacle: str) -> None:
    logger.warning("%s %s: enable takes the model's own attention with this cache", name, obstacle)
