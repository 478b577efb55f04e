"""The one-call front door: `enable(model, cache="paged")` and plain `model.generate(**inputs)` is cheap.

`enable` sets the attention and overrides, on this one instance, the method by which `generate` makes its cache;
`disable` puts both back. Nothing global changes, but that torch's optimizers tell prefix stores of their steps.
"""

import inspect
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.batching.settings import BatchConfig
from hf_kvopt.cache.bounded import require_alone
from hf_kvopt.cache.divided import require_followed
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache, option_names
from hf_kvopt.calibration import choose, warn_of_loss
from hf_kvopt.errors import UnsupportedModel, nearest
from hf_kvopt.overrides.attention import reset_attention, set_attention, takes_attention
from hf_kvopt.overrides.batching import ManagerMaker, batch_config_of, drop_manager
from hf_kvopt.overrides.cache_maker import (
    CACHES,
    LAYER_OPTIONS,
    CacheMaker,
    factory_of,
    format_of_cache,
    make_cache,
)
from hf_kvopt.overrides.inputs import CheckedPrefill, PreparedInputs
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.overrides.sharing import Sharing, install
from hf_kvopt.overrides.speculation import DraftingGenerate
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.presets import PRESETS, resolve
from hf_kvopt.ranks import require_alike
from hf_kvopt.speculation.drafters.base import Drafter
from hf_kvopt.speculation.speculative import SpeculativeDecoding, speculative

logger = logging.getLogger(__name__)

AUTO = "auto"
_STATE = "_hf_kvopt_state"


@dataclass(frozen=True)
class Enabled:
    """State that `enable` set on a model; its repr says it in one line."""

    cache: str | None  # as named in the call, or as a preset chose it
    attention: bool  # whether our attention was set
    prefix_sharing: bool
    draft: str | None  # the drafter's name
    options: dict[str, Any]  # of the cache
    previous_attention: str = field(repr=False)  # what `disable` puts back

    def __repr__(self) -> str:
        said = f"cache={self.cache!r}, attention={self.attention}, prefix_sharing={self.prefix_sharing}"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Enabled({said}, draft={self.draft!r}{options})"


def _name_of(draft: Any) -> str | None:
    """Name what drafts: as it was written, or by its class."""
    if draft is None or isinstance(draft, str):
        return draft
    return str(draft) if isinstance(draft, Path) else type(getattr(draft, "drafter", draft)).__name__


def enable(
    model: PreTrainedModel,
    cache: str | None = "paged",
    *,
    attention: bool | None = None,
    prefix_sharing: bool | PrefixStore = False,
    draft: "str | Path | Drafter | PreTrainedModel | SpeculativeDecoding | None" = None,
    batching: bool | BatchConfig = False,
    max_loss: float | None = None,
    host_tier: str | int | None = None,
    disk_tier: str | Path | None = None,
    disk_limit: str | int | None = None,
    **cache_options: Any,
) -> PreTrainedModel:
    """Make plain `model.generate(...)` use hf_kvopt's attention and cache.

    Args:
        model: a transformers model that can generate.
        cache: "paged"; a format of `QuantizedPagedCache` ("int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4", "k4v2",
            "int3", or a pair of formats of single tokens such as "int8/int4"); None to keep transformers' cache; or a
            preset ("chat", "long", "throughput", "lowest memory"), which asks the planner for this model and machine,
            prints in one line what it chose, and yields to arguments that are given beside it; or "auto", the smallest
            cache within `max_loss` by what `calibrate` measured of this model.
        attention: whether to set `attn_implementation="hf_kvopt"` too. None does so where the model takes it; where it
            does not (its attention is written into the model, or selects keys sparsely), the model's own attention is
            used with this cache, which is said once.
        prefix_sharing: compute a prompt once, across `generate` calls and inside a batch; True makes a `PrefixStore`
            of the cache's format with the options `max_tokens`, `block_size`, `skip_layers` and `layer_formats` (see
            `prefix_store(model)`), a store of this model is used as it is. Weights, adapters and hooks may change
            between calls; what changes unseen (see `PrefixStore`) needs `prefix_store(model).clear()`.
        draft: speculate in every `generate` call: a draft head, its folder, an assistant model, "suffix",
            "prompt_lookup", "lookahead", or what `speculative(...)` made, with its settings and `stats`.
        batching: let `model.generate_batch(...)`, and whatever else asks the model for a manager of continuous batching
            (TRL, transformers' server), use a `Batcher` with this cache, and the options `max_tokens`, `block_size`,
            `skip_layers` and `layer_formats`; or with the settings of a `BatchConfig`.
        max_loss: with cache="auto", per cent that perplexity may grow (0.5).
        host_tier: with prefix_sharing=True, memory of the host for prompts beyond the device's room; see `PrefixStore`.
        disk_tier: likewise, a folder in which prompts outlive the process.
        disk_limit: cap on the files in that folder.
        cache_options: handed to the cache at each `generate` call, e.g. `block_size=32`, `max_tokens="32k"`,
            `policy=SinkRecent(sinks=4, recent=1024)`.

    Returns:
        The model, for chaining.

    Raises:
        ValueError, TypeError: an unknown cache name, or options that the cache does not take. The model is as it was.
        UnsupportedModel: a model that keeps its past in a cache of its own; with attention=True, one that does not
            take this attention; with prefix_sharing, one whose keys and values depend on more than its tokens; layers
            divided over ranks (`pp_size`), or fewer heads of keys and values than ranks.
        CacheStateError: ranks that share the model (`tp_size`) name other options, or one of them does not come.

    Source: what users ask of plain `generate` in transformers' issues: prompts kept between calls (#24841, #34232),
    speculation for batches (#32165).

    Examples:
        >>> model = enable(model, cache="int8", prefix_sharing=True)
        >>> output = model.generate(**inputs)
        >>> enabled(model)
        Enabled(cache='int8', attention=True, prefix_sharing=True, draft=None)
        >>> model = disable(model)
    """
    wrapped, model = model, compat.unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"enable takes a transformers model: got {type(model).__name__}; unwrap it first, e.g. pipe.model"
        )
    require_followed(model)
    sharing_said = prefix_sharing if isinstance(prefix_sharing, bool) else type(prefix_sharing).__name__
    said = f"cache={cache!r}, attention={attention}, prefix_sharing={sharing_said}, draft={_name_of(draft)!r}"
    require_alike(model, "options of enable", f"{said}, max_loss={max_loss}, {cache_options}")
    tiers = {"host_tier": host_tier, "disk_tier": disk_tier, "disk_limit": disk_limit}
    tiers = {name: value for name, value in tiers.items() if value is not None}
    if cache in PRESETS:
        chosen = resolve(cache, model)
        given = {"prefix_sharing": prefix_sharing, "draft": draft, **tiers}
        settings = chosen.options | {name: value for name, value in given.items() if value} | cache_options
        print(chosen.said)
        return enable(wrapped, chosen.cache, attention=attention, **settings)
    if max_loss is not None and cache != AUTO:
        raise TypeError(f"max_loss is for cache={AUTO!r}, which chooses by it: got cache={cache!r}; drop one")
    if cache == AUTO:
        found = choose(model, max_loss)
        print(found.said)
        settings = {"prefix_sharing": prefix_sharing, "draft": draft, **tiers, **found.options, **cache_options}
        return enable(wrapped, found.cache, attention=attention, **settings)
    factory = factory_of(cache)
    if cache is not None and factory is None:
        known = [*CACHES, *PRESETS, AUTO]
        raise ValueError(
            f"unknown cache {cache!r}: expected one of {sorted(CACHES)}, {AUTO!r}, a preset of {list(PRESETS)}, or None"
            f"{nearest(cache, known)}"
        )
    _check_options(cache, cache_options)
    if cache is None and cache_options:
        raise ValueError(f"cache=None takes no options: got {sorted(cache_options)}; name a cache or drop them")
    compat.check()
    if cache is not None and not compat.uses_standard_cache(type(model), model.config):
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its past in a cache of its own, or keeps none: got a cache that it would "
            "ignore; use the model as it is"
        )
    attention = takes_attention(model, attention, is_all=cache is None and draft is None)
    beside = {"prefix_sharing": prefix_sharing is not False, "draft": draft is not None}
    require_alone(cache_options.get("policy"), type(model).__name__, attention, beside)
    if cache is not None and factory is not None:
        make_cache(model, factory, cache_options)  # refuse bad options now, not in the first generate
        if cache != "paged" and not set(LAYER_OPTIONS) & set(cache_options):
            warn_of_loss(model, cache)
    sharing = _sharing(model, cache, prefix_sharing, cache_options, tiers)
    drafting = _drafting(model, draft)
    batch_config = batch_config_of(model, cache, batching, cache_options, drafting)
    disable(model)
    _require_unreplaced(model, "generate" if sharing is not None or drafting is not None else None)
    previous = set_attention(model) if attention else model.config._attn_implementation
    # In the instance's own dict: `generate` calls the methods through self (nn.Module would file them elsewhere).
    if compat.PREPARE_INPUTS not in model.__dict__:  # another library's, such as PEFT's soft prompts, stays
        model.__dict__[compat.PREPARE_INPUTS] = PreparedInputs(model)
    model.__dict__[compat.PREFILL] = CheckedPrefill(model)
    if factory is not None:
        make = partial(make_cache, factory=factory, options=cache_options)
        model.__dict__[compat.MAKE_CACHE] = CacheMaker(model, make)
    generates = None if drafting is None else DraftingGenerate(model, drafting)
    if sharing is not None:
        model.__dict__[compat.MAKE_CACHE] = CacheMaker(model, sharing.make_cache)
        install(model, sharing, generates)
    elif generates is not None:
        model.__dict__["generate"] = generates
    if batch_config is not None:
        model.__dict__[compat.MAKE_MANAGER] = ManagerMaker(model, batch_config)
    state = Enabled(cache, attention, sharing is not None, _name_of(draft), cache_options, previous)
    setattr(model, _STATE, state)
    return wrapped


def enabled(model: PreTrainedModel) -> Enabled | None:
    """Return what `enable` set on `model`; None where it is not enabled."""
    return getattr(compat.unwrapped(model), _STATE, None)


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Put back what `enable` changed; a no-op on a model that is not enabled."""
    wrapped, model = model, compat.unwrapped(model)
    if hasattr(model, _STATE):
        state: Enabled = getattr(model, _STATE)
        delattr(model, _STATE)
        for name in (compat.MAKE_CACHE, compat.PREPARE_INPUTS, compat.PREFILL, compat.MAKE_MANAGER, "generate"):
            if isinstance(model.__dict__.get(name), InstanceOverride):
                del model.__dict__[name]
        drop_manager(model)
        if state.attention:
            reset_attention(model, state.previous_attention)
    return wrapped


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


def _sharing(
    model: PreTrainedModel,
    cache: str | None,
    prefix_sharing: bool | PrefixStore,
    options: dict[str, Any],
    tiers: dict[str, Any],
) -> Sharing | None:
    """Return what shares the prefixes of `model`, checked; None where nothing does."""
    if tiers and prefix_sharing is not True:
        raise ValueError(
            f"{', '.join(tiers)} keep shared prompts below the device: got prefix_sharing="
            f"{'False' if prefix_sharing is False else 'a store of its own'}; pass prefix_sharing=True, or give the "
            "store these options"
        )
    if prefix_sharing is False:
        return None
    if cache is None:
        raise ValueError("prefix_sharing needs a cache of this library: got cache=None; pass cache='paged'")
    wrong = sorted(set(options) - {"max_tokens", "block_size", *LAYER_OPTIONS})
    if wrong:
        raise TypeError(f"prefix_sharing takes max_tokens, block_size and the formats of layers: got {wrong} too")
    if isinstance(prefix_sharing, PrefixStore):
        if prefix_sharing.model is not model or options or prefix_sharing.formats.format != format_of_cache(cache):
            raise ValueError(
                f"prefix_sharing takes a store made from this very model, in the cache's format and with options of "
                f"its own: got cache={cache!r}, options {sorted(options)} and a store in format "
                f"{prefix_sharing.formats.format!r}; make it with PrefixStore(model, format=...)"
            )
        return Sharing(prefix_sharing, {})
    options = {**options, **tiers, "format": format_of_cache(cache)}
    return Sharing(PrefixStore(model, **options), options)


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
