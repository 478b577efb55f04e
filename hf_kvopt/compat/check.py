"""One look for every name, at the first use of the library."""

import functools
import inspect
import logging

from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin

from hf_kvopt.compat import attention, generation, models, names
from hf_kvopt.compat.names import (
    CACHE_KEYWORD,
    MAKE_CACHE,
    NEWEST_TESTED,
    NEXT_KWARGS,
    NEXT_LENGTH,
    PREFILL,
    PREPARE_INPUTS,
    causal_mask_function,
    eager_mask,
    is_untested,
    is_user_defined,
    missing,
    prepare_padding_mask,
    sdpa_mask,
)  # fmt: skip

logger = logging.getLogger(__name__)

_GENERATION = {
    NEXT_KWARGS: ("outputs", "model_kwargs"),
    MAKE_CACHE: ("generation_config", "model_kwargs"),
    PREFILL: ("input_ids", "generation_config", "model_kwargs"),
    PREPARE_INPUTS: ("input_ids", NEXT_LENGTH),
    "_supports_default_dynamic_cache": (),
}


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
    for name in generation.GENERATE_LOCALS:
        if name not in inspect.unwrap(GenerationMixin.generate).__code__.co_varnames:
            missing(f"{name} in GenerationMixin.generate")
    if not hasattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING"):
        missing("cache_utils.DYNAMIC_LAYER_TYPE_MAPPING")
    found_by_name = (
        models._layer_types_and_kwargs,
        generation._is_zero3,
        generation._is_fsdp,
        attention.ATTENTIONS,
        attention.MASKS,
    )
    for found in (*found_by_name, sdpa_mask, eager_mask, causal_mask_function, prepare_padding_mask):
        if getattr(found, "is_missing", False):
            found()
    # By the call of this method a modelling file is told to choose its attention.
    if not hasattr(attention.ATTENTIONS, "get_interface"):
        missing("AttentionInterface.get_interface")
    # A cache that a user hands over must be told from one that generate() made: by asking transformers to mark one.
    probe = DynamicCache()
    getattr(GenerationMixin, MAKE_CACHE)(None, GenerationConfig(), {CACHE_KEYWORD: probe}, None, 1, 1)
    if not is_user_defined(probe):
        missing("Cache._is_user_defined")
    if is_untested():
        logger.warning(
            "transformers %s is newer than %s, the newest that this hf_kvopt was tested with: what it needs was found, "
            "but compare outputs once with the plain model",
            names.VERSION,
            NEWEST_TESTED,
        )
