"""Scenarios of `generate()` for the equality eval."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from evals._common.prompts import pad_left
from hf_kvopt import CACHE_KEYWORD


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A batch of prompts and the options of generate(); lengths are shares of the longest prompt."""

    name: str
    prompt_shares: tuple[float, ...] = (1.0,)
    options: Mapping[str, Any] = field(default_factory=dict)


# Nucleus and top-k at values that hub models ship with, so that rare tokens do not decide the comparison.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
RAGGED = (1.0, 0.6, 0.2)
SCENARIOS = (
    Scenario(name="greedy"),
    Scenario(name="beam", prompt_shares=(1.0, 1.0), options={"num_beams": 4}),
    Scenario(name="sampled", options=SAMPLING),
    Scenario(name="returns", prompt_shares=(1.0, 1.0), options={**SAMPLING, "num_return_sequences": 3}),
    Scenario(name="padded", prompt_shares=RAGGED),
    Scenario(name="padded_beam", prompt_shares=RAGGED, options={"num_beams": 3, "num_return_sequences": 2}),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Result of one generate(): new tokens, and the logits that each was chosen from."""

    tokens: Tensor  # [rows, new_len] int64
    logits: Tensor  # [new_len, rows, vocab] float32: of the beam that the final row's token came from
    lengths: Tensor  # [rows] int64: steps of each row that have logits


def make_prompts(
    scenario: Scenario,
    stream: Tensor,  # [num_tokens] int64, at least prompt_len for each prompt
    prompt_len: int,
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:  # ids and mask, both [batch, prompt_len]
    """Cut one prompt after another from the stream and pad them on the left."""
    lengths = [max(1, round(prompt_len * share)) for share in scenario.prompt_shares]
    starts = range(0, prompt_len * len(lengths), prompt_len)
    return pad_left([stream[start : start + n] for start, n in zip(starts, lengths, strict=True)], pad_token_id)


def run_scenario(
    model: PreTrainedModel,
    cache: Cache,
    scenario: Scenario,
    prompts: tuple[Tensor, Tensor],
    *,
    new_tokens: int,
    pad_token_id: int,
    seed: int,
) -> Run:
    """Generate through `cache` from the same seed each time."""
    ids, mask = (tensor.to(model.device) for tensor in prompts)
    options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, **scenario.options}
    torch.manual_seed(seed)
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        **{CACHE_KEYWORD: cache},
        max_new_tokens=new_tokens,
        pad_token_id=pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    tokens = out.sequences[:, ids.shape[1] :].cpu()
    stacked = torch.stack([step.float().cpu() for step in out.logits])
    return _follow_beams(tokens, stacked, out.get("beam_indices"))


def _follow_beams(
    tokens: Tensor,  # [rows, new_len]
    logits: Tensor,  # [steps, batch * num_beams, vocab]
    beam_indices: Tensor | None,  # [rows, steps], -1 behind the end of a row
) -> Run:
    """Select for each row and step the logits of the beam it came from: running beams may swap places."""
    steps = min(len(logits), tokens.shape[1])
    if beam_indices is None:
        return Run(tokens=tokens, logits=logits, lengths=torch.full((len(tokens),), steps))
    beams = beam_indices.cpu()[:, :steps]
    picked = torch.stack([logits[step, beams[:, step].clamp(min=0)] for step in range(beams.shape[1])])
    return Run(tokens=tokens, logits=picked, lengths=(beams >= 0).sum(dim=1))
