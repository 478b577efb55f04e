"""`speculative(...)`: what a user hands to `model.generate(custom_generate=...)`."""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.draft.assistant import AssistantDrafter
from hf_kvopt.draft.decode import Speculation, align_rows, restore
from hf_kvopt.draft.drafter import Drafter
from hf_kvopt.draft.lookahead import Lookahead
from hf_kvopt.draft.lookup import PromptLookup
from hf_kvopt.draft.output import Output
from hf_kvopt.draft.policy import Policy
from hf_kvopt.draft.prefill import prefill
from hf_kvopt.draft.scores import NodeScores
from hf_kvopt.draft.stats import SpeculationStats
from hf_kvopt.errors import CacheStateError, UnsupportedModel

logger = logging.getLogger(__name__)

_BY_NAME = {"prompt_lookup": PromptLookup, "lookahead": Lookahead}
_ACCEPTANCE = ("lossless", "typical")
_MAX_GAMMA = 8
_PLAIN_CACHES = (PagedCache, QuantizedPagedCache)


class SpeculativeDecoding:
    """A `custom_generate` callable; made by `speculative`, used for any number of calls, one at a time."""

    def __init__(
        self,
        drafter: Drafter,
        policy: Policy,
        is_typical: bool,
        streamer: BaseStreamer | None,
        tokenizer: PreTrainedTokenizerBase | None,
        stop_strings: str | list[str] | None,
    ) -> None:
        self.drafter, self.policy, self.is_typical = drafter, policy, is_typical
        self.streamer, self.tokenizer, self.stop_strings = streamer, tokenizer, stop_strings

    def bound(
        self,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_strings: str | list[str] | None = None,
    ) -> "SpeculativeDecoding":
        """This, for one call, with what generate() would not hand on; it learns and counts together with this one."""
        tokenizer, stop_strings = tokenizer or self.tokenizer, stop_strings or self.stop_strings
        if stop_strings is not None and tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: got none; pass tokenizer=")
        return SpeculativeDecoding(
            self.drafter, self.policy, self.is_typical, streamer or self.streamer, tokenizer, stop_strings
        )

    @property
    def stats(self) -> SpeculationStats:
        """Accepted lengths, times and whether it fell back to plain decoding, over all calls."""
        return self.policy.stats

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What generate() calls, with everything prepared.

        Raises:
            ValueError: a setting or a drafter that does not go with this model; before the first token.
            UnsupportedModel: a model whose past cannot be taken back token by token.
            CacheStateError: a cache of another kind.
        """
        compat.check()
        names = inspect.signature(model.forward).parameters
        self._check(model, input_ids, generation_config, model_kwargs)
        scores = NodeScores(logits_processor, len(input_ids))
        cache, is_own = _cache_for(model, model_kwargs)
        rows_may_leave = is_own and not generation_config.return_dict_in_generate
        if self.stop_strings is not None:
            assert self.tokenizer is not None
            strings = StopStringCriteria(self.tokenizer, self.stop_strings)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, strings])
        kwargs = {**model_kwargs, compat.CACHE_KEYWORD: cache}
        for name in ("logits_to_keep", "num_logits_to_keep"):
            if name in names:
                kwargs[name] = 1
        columns = int(cache.get_seq_length())
        session = None
        try:
            session = self.drafter.begin(model, len(input_ids))
            layers = self.drafter.feature_layers
            ready = prefill(model, input_ids, generation_config, kwargs, cache, layers, "position_ids" in names)
            cache.activate_past_recording()
            output = Output(input_ids, stopping_criteria, generation_config, self.streamer)
            self.stats.calls += 1
            run = Speculation(
                ready.reader, self.drafter, self.policy, output, scores, generation_config, self.is_typical,
                rows_may_leave,
            )  # fmt: skip
            run.run(ready.outputs, ready.prompt, session)
            if not rows_may_leave:
                align_rows(ready.reader, output)
        except BaseException:
            if is_own:
                cache.free()
            elif len(input_ids) == cache.num_rows:
                restore(cache, columns)
            raise
        finally:
            if session is not None:
                session.close()
        return output.result(cache)

    def _check(self, model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict) -> None:
        if config.num_beams and config.num_beams > 1:
            raise ValueError(
                f"speculation decodes each row by itself: got num_beams={config.num_beams}; use num_beams=1, or "
                "generate without custom_generate"
            )
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"speculation is for decoders: got the encoder-decoder {type(model).__name__}; generate without "
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
        if self.is_typical and (not config.do_sample or len(input_ids) > 1):
            raise ValueError(
                f"acceptance='typical' is for sampling one row: got do_sample={config.do_sample} and {len(input_ids)} "
                "rows; use acceptance='lossless'"
            )
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer takes one row: got {len(input_ids)}; drop the streamer")
        positions = kwargs.get("position_ids")
        if positions is not None and positions.dim() != 2:
            raise UnsupportedModel(
                f"speculation counts positions along one axis: got position_ids of shape {list(positions.shape)}; "
                "generate without custom_generate"
            )
        self.drafter.check(model)


def speculative(
    draft: "str | Drafter | PreTrainedModel",
    *,
    gamma: int | None = None,
    num_nodes: int | None = None,
    top_k: int = 8,
    acceptance: str = "lossless",
    fallback: bool = True,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
) -> SpeculativeDecoding:
    """Speculative decoding for `model.generate(..., custom_generate=speculative(...))`, any batch size.

    The output is the target's own: greedy tokens are equal, samples have its distribution (arXiv:2211.17192).

    Args:
        draft: a draft head, an assistant model of the same tokenizer, "prompt_lookup" or "lookahead".
        gamma: tokens drafted in depth; None chooses by what was measured.
        num_nodes: tokens of a draft tree (batch 1, heads that can); None chooses, 0 never makes one.
        top_k: children of a node that a tree considers.
        acceptance: "lossless", or "typical" for Medusa's rule (arXiv:2401.10774), which is not lossless.
        fallback: decode plainly where speculation is measured to be slower.
        streamer: is given the tokens; generate() does not hand its own on to a custom_generate.
        tokenizer: of the target, for `stop_strings` and to compare with the assistant's.
        assistant_tokenizer: of the assistant, where vocabulary sizes differ by padding only.
        stop_strings: as for generate(), which refuses them here.

    Returns:
        A callable with `stats`; keep it, as it goes on learning when to speculate.

    Raises:
        ValueError, TypeError: a setting that cannot work.
    """
    drafter = _drafter_of(draft, tokenizer, assistant_tokenizer)
    for name, value, least in (("gamma", gamma, 1), ("num_nodes", num_nodes, 0), ("top_k", top_k, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}: got {value!r}")
    if acceptance not in _ACCEPTANCE:
        raise ValueError(f"acceptance must be one of {_ACCEPTANCE}: got {acceptance!r}")
    if stop_strings is not None and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: got none; pass tokenizer=")
    limit = drafter.max_gamma or _MAX_GAMMA
    if gamma is not None and drafter.max_gamma is not None and gamma > drafter.max_gamma:
        raise ValueError(f"this drafter is at most {drafter.max_gamma} tokens deep: got gamma={gamma}")
    policy = Policy(gamma, num_nodes, top_k, limit, drafter.can_tree, fallback)
    return SpeculativeDecoding(drafter, policy, acceptance == "typical", streamer, tokenizer, stop_strings)


def _drafter_of(
    draft: Any, tokenizer: PreTrainedTokenizerBase | None, assistant_tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    if isinstance(draft, str):
        if draft not in _BY_NAME:
            raise ValueError(f"unknown drafter {draft!r}: expected one of {sorted(_BY_NAME)}, a head or a model")
        drafter: Drafter = _BY_NAME[draft]()
        return drafter
    if isinstance(draft, Drafter):
        return draft
    if hasattr(draft, "drafter"):
        made: Drafter = draft.drafter()
        return made
    if isinstance(draft, PreTrainedModel):
        return AssistantDrafter(draft, tokenizer, assistant_tokenizer)
    raise TypeError(f"draft must be a head, a model or one of {sorted(_BY_NAME)}: got {type(draft).__name__}")


def _cache_for(model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[PagedCache, bool]:
    """The cache of this call, and whether it is nobody else's."""
    cache = kwargs.get(compat.CACHE_KEYWORD)
    if isinstance(cache, PagedCache):
        # A cache of a derived kind belongs to whoever made it: it outlives the call.
        is_own = type(cache) in _PLAIN_CACHES and not compat.is_user_defined(cache)
    elif cache is None or compat.is_default_cache(cache):
        cache, is_own = PagedCache(config=model.config.get_text_config(decoder=True)), True
    else:
        raise CacheStateError(
            f"speculation needs rows that can be cut one by one: got a {type(cache).__name__}; pass "
            f"{compat.CACHE_KEYWORD}=hf_kvopt.PagedCache(config=model.config), or none"
        )
    if cache._stock_layers():
        raise UnsupportedModel(
            f"{type(model).__name__} keeps states beside keys and values, which cannot be taken back token by token: "
            "got speculation; generate without custom_generate"
        )
    return cache, is_own
