"""Every name of transformers that is private or depends on its version, in one place.

    found by feature      `CACHE_KEYWORD` is the argument of a cache: `cache` since 5.24, `past_key_values` before
    checked once          `check` runs at the first use of the library, and raises for what is missing
    failing closed        a missing name raises `UnsupportedModel` with transformers' version and the name

Public classes that never moved (PreTrainedModel, GenerationConfig, DynamicCache) are imported where they are used.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from types import FrameType, ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils, masking_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.generation.continuous_batching import requests as batching_requests

from hf_kvopt.errors import UnsupportedModel

logger = logging.getLogger(__name__)

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
_NEXT_KWARGS = "_update_model_kwargs_for_generation"  # (outputs, model_kwargs): those of one token more
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # inputs of which generate() makes up those of new tokens
EXPAND_KV = "expand_kv"  # of an MLA attention module: (latents, rotary keys) to keys and values
_LONGROPES = ("longrope", "su")  # one scaling; "su" in older configs
MAKE_MANAGER = "init_continuous_batching"  # (generation_config, continuous_batching_config, workload_hints)
KEPT_MANAGER = "_cached_continuous_batching_manager"  # on a model: a manager that outlives a call
LOAD_MODEL = "_load_model"  # of the server's ModelManager
READ_SETTINGS = "_build_generation_config"  # of the server's handlers: (body, model_generation_config, use_cb)
WITHOUT_KV = ("conv", "linear_attention", "dummy")
"""Kinds of layers without keys and values: states instead, or those of another layer."""
_STATES_IN_MODULES = ("recurrent_gemma",)  # model types whose states lie in the modules and not in a cache
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


def _find(module: ModuleType, name: str) -> Any:
    """Return `module.name`; where it is gone, a function that raises at its first use."""
    found = getattr(module, name, None)
    if found is not None:
        return found

    def absent(*_: Any, **__: Any) -> NoReturn:
        missing(f"{module.__name__}.{name}")

    absent.is_missing = True  # type: ignore[attr-defined]
    return absent


eager_mask = _find(masking_utils, "eager_mask")
sdpa_mask = _find(masking_utils, "sdpa_mask")
causal_mask_function = _find(masking_utils, "causal_mask_function")
bidirectional_mask_function = _find(masking_utils, "bidirectional_mask_function")
and_masks = _find(masking_utils, "and_masks")
sliding_window_overlay = _find(masking_utils, "sliding_window_overlay")
prepare_padding_mask = _find(masking_utils, "prepare_padding_mask")
_layer_types_and_kwargs = _find(cache_utils, "get_layer_types_and_kwargs")
_is_zero3 = _find(generation_utils, "is_deepspeed_zero3_enabled")
_is_fsdp = _find(generation_utils, "is_fsdp_managed_module")
_batch_output = _find(batching_requests, "GenerationOutput")
_batch_status = _find(batching_requests, "RequestStatus")
_SERVER_NAMES = {
    "serve": ("Serve.start_server",),
    "serving.model_manager": (f"ModelManager.{LOAD_MODEL}",),
    "serving.utils": (
        "GenerationState.get_manager", "CBGenerateManager.init_cb", "CBGenerateManager.generate_streaming",
        "CBGenerateManager.generate_non_streaming", f"BaseHandler.{READ_SETTINGS}",
    ),
    "serving.server": ("build_server",),
}  # fmt: skip
_GENERATE_LOCALS = ("input_ids", "generation_config", "model_kwargs")
_GENERATION = {
    _NEXT_KWARGS: ("outputs", "model_kwargs"),
    MAKE_CACHE: ("generation_config", "model_kwargs"),
    PREFILL: ("input_ids", "generation_config", "model_kwargs"),
    PREPARE_INPUTS: ("input_ids", NEXT_LENGTH),
    "_supports_default_dynamic_cache": (),
}


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
        if all(name in known for name in _GENERATE_LOCALS):
            return known
        frame = frame.f_back
    return None


@functools.cache
def check() -> None:
    """Look for every name once, and say once that a version is newer than the tested ones.

    Raises:
        UnsupportedModel: a name is missing, or does not do what it did.
    """
    for name, parameters in _GENERATION.items():
        method = getattr(GenerationMixin, name, None)
        if method is None:
            missing(f"GenerationMixin.{name}")
        taken = [parameter for parameter in inspect.signature(method).parameters if parameter not in ("self", "cls")]
        if tuple(taken[: len(parameters)]) != parameters:
            missing(f"GenerationMixin.{name}({', '.join(parameters)}, ...)")
    for name in ("_can_set_attn_implementation", "set_attn_implementation"):
        if not hasattr(PreTrainedModel, name):
            missing(f"PreTrainedModel.{name}")
    for name in _GENERATE_LOCALS:
        if name not in inspect.unwrap(GenerationMixin.generate).__code__.co_varnames:
            missing(f"{name} in GenerationMixin.generate")
    if not hasattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING"):
        missing("cache_utils.DYNAMIC_LAYER_TYPE_MAPPING")
    for found in (
        _layer_types_and_kwargs, sdpa_mask, eager_mask, causal_mask_function, prepare_padding_mask, _is_zero3, _is_fsdp,
    ):  # fmt: skip
        if getattr(found, "is_missing", False):
            found()
    # A cache that a user hands over must be told from one that generate() made: by asking transformers to mark one.
    probe = DynamicCache()
    getattr(GenerationMixin, MAKE_CACHE)(None, GenerationConfig(), {CACHE_KEYWORD: probe}, None, 1, 1)
    if not is_user_defined(probe):
        missing("Cache._is_user_defined")
    if is_untested():
        logger.warning(
            "transformers %s is newer than %s, the newest that this hf_kvopt was tested with: what it needs was found, "
            "but compare outputs once with the plain model",
            VERSION,
            NEWEST_TESTED,
        )


def is_untested() -> bool:
    """Whether this transformers is of a newer minor version than the newest tested one."""
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


def uses_standard_cache(kind: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether generate() makes a standard cache for models of class `kind`, their forward takes it, and some layer
    fills it with keys and values."""
    supports: Any = getattr(kind, "_supports_default_dynamic_cache")  # noqa: B009
    return _cache_keyword(kind.forward) is not None and bool(supports()) and _keeps_keys_and_values(config)


def _keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    try:
        kinds, _ = layer_types(config.get_text_config(decoder=True))
    except (AttributeError, TypeError, ValueError):
        return False  # transformers makes no cache from it either: it cannot tell what its layers are
    return not set(kinds) <= set(WITHOUT_KV)


def can_choose_attention(kind: type[PreTrainedModel]) -> bool:
    """Whether models of this class call transformers' attention interface."""
    return bool(kind._can_set_attn_implementation())


def is_user_defined(cache: Cache) -> bool:
    """Whether the caller of generate() handed `cache` over."""
    return bool(getattr(cache, "_is_user_defined", False))


def is_default_cache(cache: object) -> bool:
    """Whether generate() made `cache` itself, because none was asked for."""
    return type(cache) is DynamicCache and not is_user_defined(cache)


def batch_output(
    request_id: str, prompt: list[int], tokens: list[int], logprobs: list[float], error: str | None, status: str
) -> Any:
    """Make what a manager of transformers' continuous batching gives of a request; `status` by its name."""
    return _batch_output(
        request_id=request_id,
        prompt_ids=prompt,
        generated_tokens=tokens,
        logprobs=logprobs,
        error=error,
        status=_batch_status[status],
    )


def server_modules() -> tuple[Any, Any, Any, Any]:
    """Import transformers' server: its modules `serve`, `model_manager`, `utils` and `server`.

    Raises:
        ImportError: packages that it needs are not installed.
        UnsupportedModel: a name that is built on is missing.
    """
    modules = [importlib.import_module(f"transformers.cli.{name}") for name in _SERVER_NAMES]
    for module, names in zip(modules, _SERVER_NAMES.values(), strict=True):
        for name in names:
            owner, _, attribute = name.partition(".")
            found = getattr(module, owner, None)
            if found is None or (attribute and not hasattr(found, attribute)):
                missing(f"{module.__name__}.{name}")
    serve, model_manager, utils, server = modules
    return serve, model_manager, utils, server


def next_inputs(
    model: PreTrainedModel, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return what plain decoding would feed `model` for the token behind `input_ids`, which was read with `outputs`."""
    updated = getattr(model, _NEXT_KWARGS)(outputs, dict(model_kwargs), is_encoder_decoder=False)
    longer = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
    inputs: dict[str, Any] = getattr(model, PREPARE_INPUTS)(longer, next_sequence_length=1, **updated)
    return inputs


def is_synced(model: PreTrainedModel) -> bool:
    """Whether the ranks of a sharded model must run equally many forwards: as found, or as generate() was told."""
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


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the kind of every cache layer of a decoder's `config`, and the options of its layer class."""
    kinds, options = _layer_types_and_kwargs(config)
    # One set of options for all layers before 5.19's successor of the same name.
    options = [options] * len(kinds) if isinstance(options, dict) else list(options)
    return list(kinds), options


def appended_layers(config: PreTrainedConfig) -> list[int]:
    """Return the numbers of the cache layers of which a model appends copies, in order: one for each later pass.

    A decoder that passes through some of its layers several times keeps keys and values of each pass, and tells by the
    code of its first forward which. Where that is not known here, sharing prefixes is refused at the first hit.
    """
    if getattr(config, "recurrent_kv_cache_mode", None) == "per_loop":  # Dory
        start, count, passes = config.n_input_layers, config.n_recurrent_layers, config.n_recurrent_loops
    elif getattr(config, "loop_num_passes", None) is not None:  # Inkling 2 loop
        start, passes = config.loop_layer_index_start, config.loop_num_passes
        count = config.loop_layer_index_end - start
    else:
        return []
    return [*range(start, start + count)] * (passes - 1)


def stock_layer(kind: str, options: dict[str, Any]) -> Any:
    """Make transformers' own cache layer of a kind."""
    return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)


def holds_nothing(layer: object) -> bool:
    """Whether a cache layer stands for one that reads another's keys and values, or has no attention."""
    kind = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.get("dummy")  # older versions leave such layers out
    return kind is not None and isinstance(layer, kind)


def keeps_states_in_modules(config: PreTrainedConfig) -> bool:
    """Whether a decoder's modules keep states themselves, so that no cache says what text these are of."""
    return config.model_type in _STATES_IN_MODULES


def slides(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Whether transformers' cache would slide at this layer."""
    if not getattr(config, "is_heterogeneous", True) and getattr(config, "sliding_window", None) is None:
        return False  # without reading the types of all layers, which takes longer than a short attention
    kinds, _ = layer_types(config)
    return layer_idx < len(kinds) and kinds[layer_idx] == "sliding_attention"


def is_chunked(module: torch.nn.Module) -> bool:
    """Whether an attention module attends within chunks of the text: its config names its layer so."""
    config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is None or layer_idx is None or getattr(config, "attention_chunk_size", None) is None:
        return False
    kinds, _ = layer_types(config)
    return layer_idx < len(kinds) and kinds[layer_idx] == "chunked_attention"


def length_dependent_rope(config: PreTrainedConfig) -> dict[str, int]:
    """Return the rotary scalings of a decoder by which a token's keys depend on the length of the whole text.

    Each with the length up to which they do not: `dynamic` leaves texts within `max_position_embeddings` alone,
    `longrope` rotates by another set of factors from one token beyond the original length on. 0 where none is named.
    """
    longest = getattr(config, "max_position_embeddings", None) or 0
    # Models that compute their past anew where they pass it (Phi-3) ask for this one.
    original = getattr(config, "original_max_position_embeddings", None)
    found: dict[str, int] = {}
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None) or {}
        # One set of parameters, or one for each kind of layer.
        for part in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
            for kind in {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)}:
                if "dynamic" in kind:
                    found[kind] = longest
                elif kind in _LONGROPES:
                    named = [n for n in (part.get("original_max_position_embeddings"), original) if n]
                    found[kind] = min(named, default=0)
    return found
