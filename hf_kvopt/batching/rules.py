"""Rules of one request: how its next token is chosen and when it ends, as `generate()` itself reads its settings.

    settings ─► model.generate(ids, custom_generate=...) ─► config, logits processors, stopping criteria ─► Rules

transformers prepares the call, and hands what it made to a `custom_generate` that takes it and generates nothing: a
setting means here what it means there, and what is refused there is refused here, before the request is queued.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_kvopt import compat
from hf_kvopt.batching.requirements import require_counts, require_seed

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_RETURNS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
_NOT_HERE = (
    "custom_generate", "assistant_model", "streamer", "synced_gpus", "inputs", "input_ids", "inputs_embeds",
    "attention_mask", "position_ids", "negative_prompt_ids", "negative_prompt_attention_mask", *compat.CACHE_NAMES,
)  # fmt: skip
_WHOLE = ("max_new_tokens", "min_new_tokens", "max_length", "min_length")
# Judged here by the last token, the length and the clock; other criteria are shown the whole text.
_OWN = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)


class TokenLogprob(NamedTuple):
    """Natural logarithm of the probability that the model gave to a token, before any logits processor."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens and theirs, as many as were asked for


class Rules(NamedTuple):
    """Settings of one request."""

    max_new_tokens: int
    eos: frozenset[int]
    do_sample: bool
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList  # those that look at more than the last token, the length and the clock
    deadline: float | None  # on `time.monotonic`: a request ends there, also one that still waits
    generator: torch.Generator | None  # draws where `do_sample`
    logprobs: int | None  # likeliest tokens to tell beside each token; None: no log-probabilities at all

    @property
    def is_plain(self) -> bool:
        """Tell whether the next token is the one of the largest logit."""
        return not self.do_sample and not self.processors

    def choose(self, text: Sequence[int], logits: Tensor) -> int:
        """The token behind `text`, of its logits [vocab] in float32."""
        scores = logits[None]
        if self.processors:
            # A copy, as some write into what they are given.
            scores = self.processors(torch.tensor([text], device=logits.device), scores.clone())  # type: ignore[arg-type]
            if scores.numel() != logits.numel():
                raise ValueError(
                    f"logits processors must return one row of {logits.numel():,} scores: got {list(scores.shape)}"
                )
        if not self.do_sample:
            return int(scores.argmax())
        p = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(p, 1, generator=self.generator))

    def logprob_of(self, token: int, logits: Tensor) -> TokenLogprob | None:
        """Return what is told beside a token, of its logits [vocab] in float32; None where nothing was asked for."""
        if self.logprobs is None:
            return None
        log_p = torch.log_softmax(logits, dim=-1)
        values, tokens = log_p.topk(self.logprobs)
        return TokenLogprob(token, float(log_p[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))

    def ending(self, text: Sequence[int], num_new: int) -> str | None:
        """Say why a text ends with its last token, `num_new` of whose tokens are new; None where it goes on."""
        if text[-1] in self.eos or (self.criteria and self._is_met(text)):
            return "stop"
        if num_new >= self.max_new_tokens:
            return "length"
        return "time" if self.is_late() else None

    def is_late(self) -> bool:
        """Tell whether the time limit has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _is_met(self, text: Sequence[int]) -> bool:
        met = self.criteria(torch.tensor([text]), None)
        return bool(met.all()) if isinstance(met, Tensor) else bool(met)


class _Prepared(NamedTuple):
    """Results of a prepared generate() call."""

    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    input_ids: Tensor
    extras: dict[str, Any]  # what the model's forward would be given beside the text


def rules_for(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    seed: int | None = None,
    logprobs: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    **settings: Any,  # of generate()
) -> Rules:
    """Read the settings of one request.

    Raises:
        ValueError, TypeError: a setting that generate() refuses, or that makes no sense for one row of a batch.
    """
    started = time.monotonic()
    require_seed(seed)
    _require_readable(settings)
    config: GenerationConfig | None = settings.get("generation_config")
    if stop_strings is None and config is not None and config.stop_strings is not None:
        stop_strings = config.stop_strings
        settings["generation_config"] = GenerationConfig(**{**config.to_dict(), "stop_strings": None})
    if stop_strings is not None and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: got none; pass tokenizer= as well")
    made = _prepare(model, prompt, settings)
    _require_one_row(made)
    _require_text_alone(made, prompt, settings)
    _require_alternatives(model, logprobs)
    criteria = [one for one in made.criteria if type(one) not in _OWN]
    if stop_strings is not None:
        assert tokenizer is not None
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    lengths = [one.max_length for one in made.criteria if type(one) is MaxLengthCriteria]
    eos = [int(t) for one in made.criteria if type(one) is EosTokenCriteria for t in one.eos_token_id.flatten()]
    times = [one.max_time for one in made.criteria if type(one) is MaxTimeCriteria]
    do_sample = bool(made.config.do_sample)
    return Rules(
        # Of a prompt that is as long as it may be, generate() makes one token as well.
        max_new_tokens=max(1, min(lengths) - len(prompt)),
        eos=frozenset(eos),
        do_sample=do_sample,
        processors=made.processors,
        criteria=StoppingCriteriaList(criteria),
        deadline=started + min(times) if times else None,
        generator=_generator(model, seed) if do_sample else None,
        logprobs=logprobs,
    )


def _require_readable(settings: Mapping[str, Any]) -> None:
    """Raise TypeError for settings that generate() would trip over without a word, or read as something else."""
    config = settings.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig of transformers: got {type(config).__name__}")
    for place in (vars(config) if config is not None else {}, settings):
        for name in _WHOLE:
            value = place.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name} must be an integer: got {value!r}")
        most = place.get("max_time")
        if most is not None and (not isinstance(most, (int, float)) or isinstance(most, bool)):
            raise TypeError(f"max_time must be a number of seconds: got {most!r}")
    samples = settings.get("num_return_sequences")
    if samples is not None:
        require_counts(num_return_sequences=samples)


def _prepare(model: PreTrainedModel, prompt: Sequence[int], settings: dict[str, Any]) -> _Prepared:
    """Let generate() prepare a call for one prompt, and take what it made."""
    made: list[_Prepared] = []

    def take(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **extras: Any,
    ) -> Tensor:
        made.append(_Prepared(generation_config, logits_processor, stopping_criteria, input_ids, extras))
        return input_ids

    wrong = sorted(name for name in _NOT_HERE if settings.get(name) is not None)
    if wrong:
        raise ValueError(
            f"a request is a prompt and settings of generate() for one row: got {', '.join(wrong)}; pass the tokens as "
            "input_ids, the cache and the draft to the batcher, and iterate over the request to stream it"
        )
    ids = torch.tensor([list(prompt)], device=model.device if model.device.type != "meta" else "cpu")
    generate: Callable[..., Any] = GenerationMixin.generate
    try:
        generate(model, ids, attention_mask=torch.ones_like(ids), custom_generate=take, **settings)
    except (TypeError, AttributeError) as error:  # words of Python, which do not say what they are about
        told = ", ".join(f"{name}={value!r:.60}" for name, value in settings.items())
        raise TypeError(f"generate() could not read the settings of a request: got {told}; it says: {error}") from error
    return made[0]


def _require_one_row(made: _Prepared) -> None:
    """Raise ValueError for settings that one row of a batch cannot keep."""
    config, mode = made.config, made.config.get_generation_mode()
    if mode not in _MODES:
        raise ValueError(f"a batcher decodes greedily or samples: got settings of {mode.value}; use model.generate")
    if len(made.input_ids) != 1:
        raise ValueError(
            f"a request is one row: got num_return_sequences={len(made.input_ids)}; use "
            "submit_samples(input_ids, n), whose requests share their prompt"
        )
    if config.guidance_scale not in (None, 1, 1.0):
        raise ValueError(
            f"guidance reads every text twice, which a batcher does not: got guidance_scale={config.guidance_scale}; "
            "use model.generate"
        )
    asked = [name for name in _RETURNS if getattr(config, name, None)]
    if asked:
        raise ValueError(f"a request gives tokens alone: got {', '.join(asked)}; pass logprobs=, or use model.generate")
    if config.use_cache is False:
        raise ValueError("a batcher always keeps keys and values: got use_cache=False; use model.generate")


def _require_text_alone(made: _Prepared, prompt: Sequence[int], settings: dict[str, Any]) -> None:
    """Raise ValueError where generate() would read more, or another text, than the tokens of the prompt."""
    read = sorted(name for name in settings if name in made.extras and settings[name] is not None)
    if read:
        raise ValueError(f"a request is token ids alone: got {', '.join(read)}, read beside them; use model.generate")
    if made.input_ids[0].tolist() != list(prompt):
        raise ValueError(
            "a request goes on from its prompt as it is: got settings by which generate() changes the prompt, such as "
            "token_healing; change it before, or use model.generate"
        )


def _require_alternatives(model: PreTrainedModel, logprobs: int | None) -> None:
    """Raise ValueError for a number of likeliest tokens that there cannot be."""
    if logprobs is None:
        return
    vocab = model.config.get_text_config(decoder=True).vocab_size
    if not isinstance(logprobs, int) or isinstance(logprobs, bool) or not 0 <= logprobs <= vocab:
        raise ValueError(
            f"logprobs must be a number of alternatives up to {vocab}, 0 for the token alone: got {logprobs!r}"
        )


def _generator(model: PreTrainedModel, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device=model.device if model.device.type != "meta" else "cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
