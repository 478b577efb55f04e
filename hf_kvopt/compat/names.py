"""Every name of transformers that is private or depends on its version, in one place.

    found by feature      `CACHE_KEYWORD` is the argument of a cache: `cache` since 5.24, `past_key_values` before
    checked once          `check` runs at the first use of the library, and raises for what is missing
    failing closed        a missing name raises `UnsupportedModel` with transformers' version and the name

Public classes that never moved (PreTrainedModel, GenerationConfig, DynamicCache) are imported where they are used.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any, NoReturn

import transformers
from packaging.version import Version
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from hf_kvopt.errors import UnsupportedModel

OLDEST_TESTED, NEWEST_TESTED = Version("5.19"), Version("5.24")
VERSION = Version(transformers.__version__)
CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache in `forward`, `generate` and outputs, the newest first."""
CACHE_KEYWORD = next(
    (name for name in CACHE_NAMES if any(field.name == name for field in fields(GenerateDecoderOnlyOutput))),
    CACHE_NAMES[0],
)
"""Name of the cache in this transformers."""
MAKE_CACHE = "_prepare_cache_for_generation"  # (generation_config, model_kwargs, ...): puts a cache into model_kwargs
PREFILL = "_prefill"  # (input_ids, generation_config, model_kwargs, ...): the forwards over the prompt
PREPARE_INPUTS = "prepare_inputs_for_generation"  # (input_ids, ...): the arguments of one forward, by name
NEXT_LENGTH = "next_sequence_length"  # its argument: the last tokens that are fed; None: all
NEXT_KWARGS = "_update_model_kwargs_for_generation"  # (outputs, model_kwargs): those of one token more
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # inputs of which generate() makes up those of new tokens
EXPAND_KV = "expand_kv"  # of an MLA attention module: (latents, rotary keys) to keys and values
HANDS_OUT_STATES = hasattr(Cache, "get_conv_state")
"""Whether layers ask a cache for their states; before, whether there are any, and then read them from its layers."""
PREFILL_CHUNKS_GO_ON = Version("5.21") <= VERSION
"""Whether a prefill in chunks begins where the cache ends; before, it began at the first token."""


def missing(name: str) -> NoReturn:
    """Raise UnsupportedModel for a name that this transformers lacks."""
    raise UnsupportedModel(
        f"transformers {VERSION} has no {name}: got a version that this hf_kvopt does not know; expected one from "
        f"{OLDEST_TESTED} to {NEWEST_TESTED}: pip install 'transformers<={NEWEST_TESTED}.99', or update hf-kvopt"
    )


def find(module: ModuleType, name: str) -> Any:
    """Return `module.name`; where it is gone, a function that raises at its first use."""
    found = getattr(module, name, None)
    if found is not None:
        return found

    def absent(*_: Any, **__: Any) -> NoReturn:
        missing(f"{module.__name__}.{name}")

    absent.is_missing = True  # type: ignore[attr-defined]
    return absent


eager_mask = find(masking_utils, "eager_mask")
sdpa_mask = find(masking_utils, "sdpa_mask")
causal_mask_function = find(masking_utils, "causal_mask_function")
bidirectional_mask_function = find(masking_utils, "bidirectional_mask_function")
and_masks = find(masking_utils, "and_masks")
sliding_window_overlay = find(masking_utils, "sliding_window_overlay")
prepare_padding_mask = find(masking_utils, "prepare_padding_mask")


def is_untested() -> bool:
    """Return whether this transformers is of a newer minor version than the newest tested one."""
    return (VERSION.major, VERSION.minor) > (NEWEST_TESTED.major, NEWEST_TESTED.minor)


def original(owner: Any, name: str) -> Callable[..., Any]:
    """Return the method `name` of the class of `owner`, bound to it, past any override on the instance."""
    method = getattr(type(owner), name, None)
    if method is None:
        missing(f"{type(owner).__name__}.{name}")
    return functools.partial(method, owner)


def cache_keyword(model: PreTrainedModel) -> str:
    """Return the name by which the forward of `model` takes a cache; remote code may use the older one.

    Raises:
        UnsupportedModel: the forward takes none.
    """
    name = _cache_keyword(type(model).forward if "forward" not in vars(model) else model.forward)
    if name is None:
        raise UnsupportedModel(
            f"the forward of {type(model).__name__} takes no cache: expected a parameter named "
            f"{' or '.join(CACHE_NAMES)}; use the model as it is"
        )
    return name


@functools.lru_cache(maxsize=256)
def _cache_keyword(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    # A newer name than this transformers' means something else: XLM took a `cache` of its own kind before 5.24.
    known = CACHE_NAMES[CACHE_NAMES.index(CACHE_KEYWORD) :]
    return next((name for name in known if name in parameters), None)


def can_choose_attention(kind: type[PreTrainedModel]) -> bool:
    """Return whether models of this class call transformers' attention interface."""
    return bool(kind._can_set_attn_implementation())


def is_user_defined(cache: Cache) -> bool:
    """Return whether the caller of generate() handed `cache` over."""
    return bool(getattr(cache, "_is_user_defined", False))


def is_default_cache(cache: object) -> bool:
    """Return whether generate() made `cache` itself, because none was asked for."""
    return type(cache) is DynamicCache and not is_user_defined(cache)
