"""Timing of sides in one process, turn by turn in rotating order, so that drift affects all alike."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from transformers import Cache

from evals._common.clock import Clock
from evals._common.memory import KVBytes, kv_bytes
from evals._common.models import Subject
from evals._common.noise import LOGIT_NOISE
from evals._common.screen import Advance
from evals._common.sides import Side
from evals.speed.workload import Workload, decode, generate, prefill

# Steps of one side before the next has its turn: short enough that all see the same machine, long enough that the
# contents that others left in the CPU's caches matter little. Decoding is not interrupted by other caches, and the
# first step after a switch is 3 to 8 % slower than the following ones (six sides at 128 tokens).
STRETCH = 16


@dataclass(kw_only=True)
class Timings:
    """Times of a side, entry i before entry i + 1 of any side: one for each repeat, of steps one for each stretch."""

    prefill_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    generate_ms: list[float] = field(default_factory=list)
    kv: KVBytes = field(default_factory=KVBytes)


def differing_sides(
    subject: Subject,
    sides: Sequence[Side],
    work: Workload,
    ids: Tensor,  # [batch, context + steps]
) -> dict[Side, str]:
    """Feed every side the same tokens, and return the faults of those whose logits differ from the first side's.

    This also warms up: each side does all of the work once.
    """
    expected = _all_logits(subject, sides[0], work, ids)
    wrong = {}
    for side in sides[1:]:
        fault = _fault(expected, _all_logits(subject, side, work, ids), subject.model.dtype, side.loss)
        if fault is not None:
            wrong[side] = fault
    return wrong


def _all_logits(subject: Subject, side: Side, work: Workload, ids: Tensor) -> Tensor:  # [1 + steps, batch, vocab]
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    first = prefill(model, cache, ids[:, : work.context])
    return torch.stack([first, *decode(model, cache, ids[:, work.context :])]).float()


def _fault(expected: Tensor, got: Tensor, dtype: torch.dtype, loss: float) -> str | None:
    delta, largest = float((got - expected).abs().max()), float(expected.abs().max())
    bound = (loss + LOGIT_NOISE[str(dtype).removeprefix("torch.")]) * largest
    if not delta <= bound:
        return f"a logit differs by {delta:.2e}, more than {bound:.2e}"
    if dtype == torch.float32 and not loss and not got.argmax(-1).equal(expected.argmax(-1)):
        return "a greedy token differs"
    return None


def time_sides(
    subject: Subject,
    sides: Sequence[Side],
    work: Workload,
    ids: Tensor,  # [batch, context + steps]
    repeats: int,
    advance: Advance,
) -> dict[Side, Timings]:
    """Time prefill, decode steps and a whole generate() of every side; the caches of all sides are alive at once."""
    clock = Clock(subject.model.device)
    timings = {side: Timings() for side in sides}
    for repeat in range(repeats):
        turn = repeat % len(sides)
        order = [*sides[turn:], *sides[:turn]]
        gc.collect()
        caches = {side: _time_prefill(clock, subject, side, work, ids, timings[side]) for side in order}
        for start in range(work.context, work.context + work.steps, STRETCH):
            for side, cache in caches.items():
                _time_steps(clock, subject, side, cache, ids[:, start : start + STRETCH], timings[side])
        for side in order:
            timings[side].kv = kv_bytes(caches.pop(side))
            if work.new_tokens:
                _time_generate(clock, subject, side, work, ids, timings[side])
            advance(f"{work.context} tokens, batch {work.batch}: {side}")
    return timings


def _time_prefill(clock: Clock, subject: Subject, side: Side, work: Workload, ids: Tensor, timings: Timings) -> Cache:
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    clock.settle()
    timings.prefill_ms.append(clock.time_ms(lambda: prefill(model, cache, ids[:, : work.context])))
    return cache


def _time_steps(
    clock: Clock,
    subject: Subject,
    side: Side,
    cache: Cache,
    ids: Tensor,  # [batch, at most STRETCH]
    timings: Timings,
) -> None:
    model = side.attend(subject.model)
    clock.settle()
    timings.step_ms.append(clock.time_ms(lambda: decode(model, cache, ids)) / ids.shape[1])


def _time_generate(clock: Clock, subject: Subject, side: Side, work: Workload, ids: Tensor, timings: Timings) -> None:
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    clock.settle()
    prompt = ids[:, : work.context]
    timings.generate_ms.append(clock.time_ms(lambda: generate(model, cache, prompt, work.new_tokens)))


def median_ratio(subject_ms: Sequence[float], peer_ms: Sequence[float]) -> float:
    """Return the median of subject over peer; entries i of both ran one after the other, so that drift cancels."""
    return median(a / b for a, b in zip(subject_ms, peer_ms, strict=True))
