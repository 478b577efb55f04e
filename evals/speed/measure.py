"""Times sides in one process, repeat by repeat in rotating order, so that drift is shared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from evals._common.clock import Clock
from evals._common.memory import KVBytes, kv_bytes
from evals._common.models import Subject
from evals._common.noise import LOGIT_NOISE
from evals._common.screen import Advance
from evals._common.sides import Side
from evals.speed.workload import Workload, decode, generate, prefill


@dataclass(kw_only=True)
class Timings:
    """One entry a repeat: repeat i of every side ran before repeat i + 1 of any."""

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
    """Feed every side the same tokens, and say of each whose logits are not the first side's what is wrong.

    It is the warm-up as well: each side does all of the work once.
    """
    expected = _all_logits(subject, sides[0], work, ids)
    wrong = {}
    for side in sides[1:]:
        fault = _fault(expected, _all_logits(subject, side, work, ids), subject.model.dtype)
        if fault is not None:
            wrong[side] = fault
    return wrong


def _all_logits(subject: Subject, side: Side, work: Workload, ids: Tensor) -> Tensor:  # [1 + steps, batch, vocab]
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    first = prefill(model, cache, ids[:, : work.context])
    return torch.stack([first, *decode(model, cache, ids[:, work.context :])]).float()


def _fault(expected: Tensor, got: Tensor, dtype: torch.dtype) -> str | None:
    delta, largest = float((got - expected).abs().max()), float(expected.abs().max())
    bound = LOGIT_NOISE[str(dtype).removeprefix("torch.")] * largest
    if not delta <= bound:
        return f"a logit differs by {delta:.2e}, more than {bound:.2e}"
    if dtype == torch.float32 and not got.argmax(-1).equal(expected.argmax(-1)):
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
    """Time prefill, decode steps (mean over the steps of a repeat) and a whole generate() of every side."""
    clock = Clock(subject.model.device)
    timings = {side: Timings() for side in sides}
    for repeat in range(repeats):
        turn = repeat % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            _time_forward(clock, subject, side, work, ids, timings[side])
            if work.new_tokens:
                _time_generate(clock, subject, side, work, ids, timings[side])
            advance(f"{work.context} tokens, batch {work.batch}: {side}")
    return timings


def _time_forward(clock: Clock, subject: Subject, side: Side, work: Workload, ids: Tensor, timings: Timings) -> None:
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    clock.settle()
    timings.prefill_ms.append(clock.time_ms(lambda: prefill(model, cache, ids[:, : work.context])))
    clock.settle()
    timings.step_ms.append(clock.time_ms(lambda: decode(model, cache, ids[:, work.context :])) / work.steps)
    timings.kv = kv_bytes(cache)


def _time_generate(clock: Clock, subject: Subject, side: Side, work: Workload, ids: Tensor, timings: Timings) -> None:
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    clock.settle()
    prompt = ids[:, : work.context]
    timings.generate_ms.append(clock.time_ms(lambda: generate(model, cache, prompt, work.new_tokens)))


def median_ratio(subject_ms: Sequence[float], peer_ms: Sequence[float]) -> float:
    """Give the median over repeats of subject over peer, each pair from the same repeat."""
    return median(a / b for a, b in zip(subject_ms, peer_ms, strict=True))
