"""`speculative(...)`: makes the callable for `model.generate(custom_generate=...)`."""

import inspect
import logging
from contextlib import nullcontext
from pathlib import Path
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
from hf_kvopt.cache import recording
from hf_kvopt.cache.mark import Mark
from hf_kvopt.cache.stepwise import stepwise
from hf_kvopt.errors import nearest
from hf_kvopt.speculation.drafters.assistant import AssistantDrafter
from hf_kvopt.speculation.drafters.base import Drafter
from hf_kvopt.speculation.drafters.lookahead import Lookahead
from hf_kvopt.speculation.drafters.prompt_lookup import PromptLookup
from hf_kvopt.speculation.drafters.retokenized import RetokenizedDrafter
from hf_kvopt.speculation.drafters.suffix import SuffixLookup
from hf_kvopt.speculation.heads.auto import DraftHead
from hf_kvopt.speculation.loop.decode import Speculation
from hf_kvopt.speculation.loop.output import Output
from hf_kvopt.speculation.loop.policy import Policy
from hf_kvopt.speculation.loop.prefill import prefill
from hf_kvopt.speculation.loop.remembered import Remembered
from hf_kvopt.speculation.loop.requirements import cache_for, require_steady_rope, require_supported
from hf_kvopt.speculation.loop.scores import NodeScores
from hf_kvopt.speculation.loop.stats import SpeculationStats

logger = logging.getLogger(__name__)

_BY_NAME = {"suffix": SuffixLookup, "prompt_lookup": PromptLookup, "lookahead": Lookahead}
_ACCEPTANCE = ("lossless", "typical")
_MAX_GAMMA = 8
_EMPTIED = (
    "hf_kvopt: the cache that was passed in could not be brought back to what it held before this call, and is empty "
    "now; pass it with the whole text again"
)


class SpeculativeDecoding:
    """A `custom_generate` callable made by `speculative`; serves any number of calls, one at a time."""

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
        self.remembered = Remembered(policy, drafter)
        self.streamer, self.tokenizer, self.stop_strings = streamer, tokenizer, stop_strings

    def bound(
        self,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_strings: str | list[str] | None = None,
    ) -> "SpeculativeDecoding":
        """Return a copy for one call, with arguments that generate() drops; it shares drafter and statistics."""
        tokenizer, stop_strings = tokenizer or self.tokenizer, stop_strings or self.stop_strings
        if stop_strings is not None and tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: got none; pass tokenizer=")
        twin = SpeculativeDecoding(
            self.drafter, self.policy, self.is_typical, streamer or self.streamer, tokenizer, stop_strings
        )
        twin.remembered = self.remembered
        return twin

    @property
    def stats(self) -> SpeculationStats:
        """Accepted lengths, times, and whether it fell back to plain decoding, over all calls."""
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
        """Generate; generate() calls this with prepared arguments.

        Raises:
            ValueError: a setting or drafter does not fit this model; raised before the first token.
            UnsupportedModel: the past of the model cannot be cropped token by token.
            CacheStateError: the cache is of another kind.
        """
        compat.check()
        require_supported(model, input_ids, generation_config, model_kwargs)
        self._check(model, input_ids, generation_config)
        self.remembered.meet(model)
        cache, is_own = cache_for(model, model_kwargs)
        mark = None if is_own else Mark(cache)
        try:
            if self.stop_strings is not None:
                assert self.tokenizer is not None
                strings = StopStringCriteria(self.tokenizer, self.stop_strings)
                stopping_criteria = StoppingCriteriaList([*stopping_criteria, strings])
            output = Output(input_ids, stopping_criteria, generation_config, self.streamer)
            kwargs = {**model_kwargs, compat.CACHE_KEYWORD: cache}
            held, longest = int(cache.get_seq_length()), output.max_length
            require_steady_rope(model, input_ids, generation_config, kwargs, held, longest)
            output.begin()
            self._run(model, input_ids, output, logits_processor, generation_config, kwargs, is_own)
            self.remembered.note()
            return output.result(cache)
        except BaseException as error:
            if mark is None:
                cache.free()
            elif not mark.restore():
                error.add_note(_EMPTIED)
            raise
        finally:
            if mark is not None:
                mark.release()

    def _run(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        output: Output,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        kwargs: dict[str, Any],
        is_own: bool,
    ) -> None:
        """Generate into `output`, with the cache of `kwargs`."""
        cache, names = kwargs[compat.CACHE_KEYWORD], inspect.signature(model.forward).parameters
        for name in ("logits_to_keep", "num_logits_to_keep"):
            if name in names:
                kwargs[name] = 1
        scores = NodeScores(processors, len(input_ids))
        rows_may_leave = is_own and not config.return_dict_in_generate
        session = self.drafter.begin(model, len(input_ids))
        try:
            layers = self.drafter.feature_layers
            ready = prefill(model, input_ids, config, kwargs, cache, layers, "position_ids" in names)
            recording.begin(cache)
            self.stats.calls += 1
            run = Speculation(
                ready.reader, self.drafter, self.policy, output, scores, config, self.is_typical, rows_may_leave
            )
            with stepwise(model) if cache.records_states else nullcontext():
                run.run(ready.outputs, ready.prompt, session)
                if not rows_may_leave:
                    run.align()
        finally:
            recording.end(cache)
            session.close()

    def _check(self, model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig) -> None:
        if self.is_typical and (not config.do_sample or len(input_ids) > 1):
            raise ValueError(
                f"acceptance='typical' is for sampling one row: got do_sample={config.do_sample} and {len(input_ids)} "
                "rows; use acceptance='lossless'"
            )
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer takes one row: got {len(input_ids)}; drop the streamer")
        self.drafter.check(model)


def speculative(
    draft: "str | Path | Drafter | PreTrainedModel",
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
    """Return a callable that decodes speculatively, for `model.generate(..., custom_generate=...)` and any batch size.

    The output is the target's own: greedy tokens are equal, samples have its distribution (arXiv:2211.17192).

    Args:
        draft: a draft head, its folder or repository, an assistant model, "suffix",
            "prompt_lookup" or "lookahead".
        gamma: depth of a draft in tokens; None chooses it from measurements.
        num_nodes: tokens of a draft tree (batch 1, heads that support trees); None or 0 drafts chains.
        top_k: children of a node that a tree considers.
        acceptance: "lossless", or "typical" for Medusa's rule (arXiv:2401.10774), which is not lossless.
        fallback: decode plainly where speculation is measured to be slower.
        streamer: gets the tokens; generate() does not pass its own on to a custom_generate.
        tokenizer: the target's, for `stop_strings` and for comparison with the assistant's.
        assistant_tokenizer: the assistant's, needed if vocabulary sizes differ. Where it is another tokenizer than
            `tokenizer`, drafts pass as text (universal assisted generation).
        stop_strings: strings that end a row, as in generate(), which refuses them here.

    Returns:
        A callable with `stats`. Keep it for further calls: it learns when to speculate.

    Raises:
        ValueError, TypeError: a setting that cannot work.
        FileNotFoundError: no draft head was found where one was named.

    Examples:
        >>> speculation = speculative("prompt_lookup")
        >>> output = model.generate(**inputs, custom_generate=speculation)
        >>> speculation.stats.calls
        1
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
    policy = Policy(gamma, num_nodes, top_k, limit, drafter.can_tree, fallback, drafter.max_confidence)
    return SpeculativeDecoding(drafter, policy, acceptance == "typical", streamer, tokenizer, stop_strings)


def _drafter_of(
    draft: Any, tokenizer: PreTrainedTokenizerBase | None, assistant_tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    if isinstance(draft, str) and draft in _BY_NAME:
        drafter: Drafter = _BY_NAME[draft]()
        return drafter
    if isinstance(draft, str | Path):
        if isinstance(draft, str) and "/" not in draft and not Path(draft).expanduser().is_dir():
            raise ValueError(
                f"unknown drafter {draft!r}: expected one of {sorted(_BY_NAME)}, the folder of a draft head, a head or "
                f"a model{nearest(draft, _BY_NAME)}"
            )
        head = DraftHead.from_pretrained(draft)
        head.follows_target = True  # the caller has no head to move
        return head
    if isinstance(draft, Drafter):
        return draft
    if hasattr(draft, "drafter"):
        made: Drafter = draft.drafter()
        return made
    if isinstance(draft, PreTrainedModel):
        has_both = tokenizer is not None and assistant_tokenizer is not None
        if has_both and tokenizer.get_vocab() != assistant_tokenizer.get_vocab():  # type: ignore[union-attr]
            return RetokenizedDrafter(draft, tokenizer, assistant_tokenizer)  # type: ignore[arg-type]
        return AssistantDrafter(draft, tokenizer, assistant_tokenizer)
    raise TypeError(f"draft must be a head, a model or one of {sorted(_BY_NAME)}: got {type(draft).__name__}")
