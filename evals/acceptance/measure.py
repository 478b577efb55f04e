"""Timing of sides, turn by turn over the same prompts, with the counts of speculation meanwhile."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hf_kvopt
from evals._common.clock import Clock
from evals._common.screen import Advance
from evals.acceptance.sides import Side

Inputs = Mapping[str, Tensor]


class Measured(NamedTuple):
    """Seconds of each turn over all prompts, the tokens of one turn, and the counts of all turns."""

    seconds: list[float]
    num_tokens: int
    counts: hf_kvopt.SpeculationStats | None


def differing(sides: Sequence[Side], batches: Sequence[Inputs], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong with each side whose greedy tokens differ from the first side's; also warms up."""
    faults = {}
    greedy = {**settings, "do_sample": False}
    wanted = [sides[0].call(batch, greedy) for batch in batches]
    for side in sides[1:]:
        got = [side.call(batch, greedy) for batch in batches]
        wrong = [i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if not torch.equal(a, b)]
        if wrong:
            faults[side.name] = f"tokens of {len(wrong)} of {len(batches)} batches"
    return faults


def time_sides(
    sides: Sequence[Side], batches: Sequence[Inputs], settings: Mapping[str, Any], repeats: int, advance: Advance
) -> dict[str, Measured]:
    """Time every side over all `batches`, `repeats` times, interleaved."""
    clock = Clock(batches[0]["input_ids"].device)
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    before = {side.name: deepcopy(side.stats) for side in sides}
    for turn in range(repeats):
        for side in sides:
            torch.manual_seed(turn)
            clock.settle()
            seconds[side.name].append(clock.time_ms(partial(_generate_all, side, batches, settings)) / 1e3)
            advance(side.name)
    tokens = sum(len(batch["input_ids"]) for batch in batches) * settings["max_new_tokens"]
    return {side.name: Measured(seconds[side.name], tokens, _since(before[side.name], side.stats)) for side in sides}


def _generate_all(side: Side, batches: Sequence[Inputs], settings: Mapping[str, Any]) -> None:
    for batch in batches:
        side.call(batch, settings)


def _since(
    before: hf_kvopt.SpeculationStats | None, after: hf_kvopt.SpeculationStats | None
) -> hf_kvopt.SpeculationStats | None:
    """Return the counts made between `before` and `after`."""
    if before is None or after is None:
        return None
    since = deepcopy(after)
    for name, value in vars(before).items():
        if isinstance(value, list):
            new = list(getattr(since, name))
            setattr(since, name, [x - (value[i] if i < len(value) else 0) for i, x in enumerate(new)])
        elif not isinstance(value, bool):
            setattr(since, name, getattr(since, name) - value)
    return since


def row_of(side: Side, measured: Measured, baselines: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the figures of a side as they are written."""
    rate = measured.num_tokens / median(measured.seconds)
    row: dict[str, Any] = {
        "side": side.name,
        "tokens_per_s": rate,
        "seconds": measured.seconds,
        **{f"speedup_{name}": median(m.seconds) / median(measured.seconds) for name, m in baselines.items()},
    }
    counts = measured.counts
    if counts is not None:
        steps = max(1, counts.steps)
        row |= {
            "mean_accepted_length": counts.mean_accepted_length,
            "acceptance_by_depth": counts.acceptance_by_depth,
            "verifications": counts.steps,
            "plain_steps": counts.plain_steps,
            "draft_ms": counts.draft_s / steps * 1e3,
            "verify_ms": counts.verify_s / steps * 1e3,
            "plain_ms": counts.plain_s / max(1, counts.plain_steps) * 1e3,
            "fell_back": counts.fell_back,
        }
    return row
