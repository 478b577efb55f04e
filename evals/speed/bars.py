"""Target ratios of the random `bench` shape on two CPU cores in float32."""

from collections.abc import Mapping
from typing import NamedTuple

from evals._common.sides import Side
from evals.speed.measure import Timings, median_ratio

OURS = Side("paged", "hf_kvopt")
INT8 = Side("int8", "hf_kvopt")
TRANSFORMERS_FP8 = Side("transformers_fp8", "sdpa")
DYNAMIC = Side("dynamic", "sdpa")
STATIC = Side("static", "sdpa")


class Bar(NamedTuple):
    """Limit of our median time over the peer's; context None is any."""

    metric: str
    context: int | None
    peer: Side
    limit: float
    ours: Side = OURS


class Verdict(NamedTuple):
    """A bar with its measured ratio."""

    bar: Bar
    context: int
    ratio: float

    @property
    def is_met(self) -> bool:
        return self.ratio <= self.bar.limit


BARS = (
    Bar("step_ms", 8192, STATIC, 0.95),
    Bar("step_ms", 8192, DYNAMIC, 0.55),
    Bar("step_ms", 128, DYNAMIC, 1.05),
    Bar("prefill_ms", None, DYNAMIC, 1.05),
    Bar("step_ms", 8192, DYNAMIC, 1.0, INT8),
    Bar("step_ms", 8192, TRANSFORMERS_FP8, 0.30, INT8),
)


def judge(context: int, timings: Mapping[Side, Timings]) -> list[Verdict]:
    """Return the verdict on every bar that this context and these sides allow."""
    verdicts = []
    for bar in BARS:
        if bar.context in (None, context) and bar.ours in timings and bar.peer in timings:
            ours, peer = getattr(timings[bar.ours], bar.metric), getattr(timings[bar.peer], bar.metric)
            verdicts.append(Verdict(bar, context, median_ratio(ours, peer)))
    return verdicts
