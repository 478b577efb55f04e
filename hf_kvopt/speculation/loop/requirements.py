"""Requirements of speculation on a call and a model; anything else is refused before the first token."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.cache.recording import state_layers
from hf_kvopt.cache.stepwise import reads_by_token
from hf_kvopt.compat import ModelTraits, model_traits
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.prefix.attributes import is_rowwise
from hf_kvopt.speculation.loop.prefill import prompt_columns

# Model types for which a forward over several tokens differs from several forwards over one.
_NOT_BY_TOKEN = {
    "doge": "its attention keeps the keys of the largest values, and which of equal ones depends on how many are read",
    "prophetnet": "its decoder takes one token at a time behind a cache",
}
# Model types that take positions and still count columns: Git widens each mask by the columns of an image.
_COLUMN_COUNTERS = ("git",)
_PLAIN_CACHES = (PagedCache, QuantizedPagedCache)
_MODES = ("greedy_search", "sample", "assisted_generation")


def require_supported(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Refuse calls that no drafter can serve.

    Raises:
        ValueError: an unsupported setting of the call.
        UnsupportedModel: an unsupported model, or inputs of it.
    """
    if config.num_beams and config.num_beams > 1:
        raise ValueError(
            f"speculation decodes each row by itself: got num_beams={config.num_beams}; use num_beams=1, or "
            "generate without custom_generate"
        )
    mode = config.get_generation_mode().value
    if mode not in _MODES:
        raise ValueError(
            f"speculation decodes greedily or by sampling: got settings for {mode}; drop them, or generate "
            "without custom_generate"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"speculation is for decoders: got the encoder-decoder {type(model).__name__}; generate without "
            "custom_generate"
        )
    if not compat.uses_standard_cache(type(model), model.config):
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its past in a cache of its own, or keeps none: got speculation, which takes "
            "rejected tokens back out of it; generate without custom_generate"
        )
    reason = _NOT_BY_TOKEN.get(model.config.get_text_config(decoder=True).model_type)
    if reason is not None:
        raise UnsupportedModel(
            f"speculation reads several tokens at once: got {type(model).__name__}, for which that is not the same as "
            f"one by one ({reason}); generate without custom_generate"
        )
    if compat.is_synced(model):
        raise UnsupportedModel(
            f"ranks of a sharded model must run equally many forwards: got {type(model).__name__} under FSDP or "
            "ZeRO-3, or synced_gpus=True, and speculation, which runs as many as its text takes; generate without "
            "custom_generate"
        )
    if config.use_cache is False:
        raise ValueError("speculation needs the cache: got use_cache=False; drop it")
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "speculation records scores and logits alone: got output_attentions or output_hidden_states; drop them"
        )
    if input_ids.shape[1] == 0:
        raise ValueError("speculation drafts behind a text: got prompts without a token; pass input_ids")
    if input_ids.shape[0] > 1 and is_rowwise(model):
        raise UnsupportedModel(
            f"speculation reads the rows of a batch as one text: got {len(input_ids)} rows of {type(model).__name__} "
            "that go through adapters of their own (adapter_names); generate row by row, or without drafts"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise UnsupportedModel(
            f"speculation counts positions along one axis: got position_ids of shape {list(positions.shape)}; "
            "generate without custom_generate"
        )


def require_steady_rope(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    held: int,
    max_length: int,
) -> None:
    """Refuse texts that may outgrow the length from which a token's keys depend on the length of the text.

    Rows of a batch are read at different lengths, and each token together with others that may not stay.

    Args:
        held: columns of the cache.
        max_length: longest row that the call may return, in tokens of `input_ids`.

    Raises:
        UnsupportedModel: a text may grow longer than that.
    """
    scalings = compat.length_dependent_rope(model.config.get_text_config(decoder=True))
    if not scalings:
        return
    kind = min(scalings, key=lambda name: scalings[name])
    read, positions = prompt_columns(input_ids, config, model_kwargs, held), model_kwargs.get("position_ids")
    if positions is not None:
        read = max(read, int(positions.max()) + 1)
    num_new = max_length - input_ids.shape[1]
    longest = read + num_new - 1  # the last token is not read
    if longest > scalings[kind]:
        raise UnsupportedModel(
            f"speculation reads several tokens at once: got {type(model).__name__}, whose keys depend by its rotary "
            f"scaling of type {kind} on the length of a text beyond {scalings[kind]} tokens, and one that may grow to "
            f"{longest}; generate at most {max(0, num_new - longest + scalings[kind])} new tokens, or without "
            "custom_generate"
        )


def cache_for(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> tuple[PagedCache, bool]:
    """Return the cache of this call, and whether it belongs to this call alone.

    Raises:
        CacheStateError: the cache is of another kind.
        UnsupportedModel: layers of the model keep states that cannot be cropped.
    """
    cache = model_kwargs.get(compat.CACHE_KEYWORD)
    if isinstance(cache, PagedCache):
        # A cache of a derived class belongs to whoever made it, and outlives the call.
        is_own = type(cache) in _PLAIN_CACHES and not compat.is_user_defined(cache)
    elif cache is None or (compat.is_default_cache(cache) and not _is_offloading(cache)):
        cache, is_own = PagedCache(config=model.config.get_text_config(decoder=True)), True
    else:
        kind = f"{type(cache).__name__}(offloading=True)" if _is_offloading(cache) else type(cache).__name__
        raise CacheStateError(
            f"speculation needs rows that can be cut one by one: got a {kind}; pass "
            f"{compat.CACHE_KEYWORD}=hf_kvopt.PagedCache(config=model.config), or none, and no cache_implementation"
        )
    require_states_taken_back(model, cache)
    slides = any(layer.is_sliding for layer in cache._paged_layers())
    if slides and not _traits(model).masks_windows:
        raise UnsupportedModel(
            f"{type(model).__name__} looks as far back as its cache hands keys out: got speculation, where several "
            "tokens share what is handed out; generate without custom_generate"
        )
    return cache, is_own


def require_states_taken_back(model: PreTrainedModel, cache: PagedCache) -> None:
    """Raise UnsupportedModel where `model`, target or assistant, keeps what cannot go back to a token before."""
    if cache._stock_layers() and (cache._states_elsewhere or not state_layers(cache) or not reads_by_token(model)):
        raise UnsupportedModel(
            f"{type(model).__name__} keeps states or keys of its own beside keys and values, which cannot be taken "
            "back token by token: got speculation; generate without custom_generate"
        )


def counts_columns(model: PreTrainedModel) -> bool:
    """Return whether `model` derives positions from the columns of the cache, so that rows must advance together."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return not takes_positions or model.config.get_text_config(decoder=True).model_type in _COLUMN_COUNTERS


def reads_trees(model: PreTrainedModel) -> bool:
    """Return whether `model` takes a token's ancestors, and their distance, from mask and positions alone."""
    return not counts_columns(model) and _traits(model).calls_interface


def _traits(model: PreTrainedModel) -> ModelTraits:
    return model_traits(type(model.config.get_text_config(decoder=True)))  # type: ignore[arg-type]


def _is_offloading(cache: Any) -> bool:
    return isinstance(cache, DynamicCache) and bool(cache.offloading)
