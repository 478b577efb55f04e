"""Bars that the quantized caches have to reach: one for each format, on each model that has some.

Losses are judged at any chunk size and on any text; a model is known by the name it was asked for. Memory is judged by
the arithmetic of `hf_kvopt.plan.memory` at 32k tokens in bfloat16, which `evals.memory` holds to the allocator.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evals._common.prompts import corpus_of
from evals._common.sides import Side


class Bar(NamedTuple):
    """A figure of a cache must not exceed the limit.

    metric: "delta", the share by which perplexity grew; "kl_mean", nats; "top1_lost", the share of tokens where the
    likeliest next token is another; "bf16_share", of bfloat16's bytes at 32k tokens.
    """

    cache: str
    metric: str
    limit: float


class Verdict(NamedTuple):
    """A bar with what was measured, and the interval of it where there is one."""

    bar: Bar
    side: Side
    chunk: int
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_met(self) -> bool:
        """A NaN meets no bar."""
        return self.value <= self.bar.limit

    @property
    def word(self) -> str:
        """The verdict in words; it says where the interval reaches over the limit."""
        is_open = self.low is not None and self.high is not None and self.low <= self.bar.limit < self.high
        return ("met" if self.is_met else "MISSED") + (", not beyond doubt" if is_open else "")


QWEN = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
MEMORY = (
    Bar("int8", "bf16_share", 0.53),
    Bar("fp8_e4m3", "bf16_share", 0.53),
    Bar("fp8_e5m2", "bf16_share", 0.53),
    Bar("k8v4", "bf16_share", 0.41),
    Bar("int4", "bf16_share", 0.30),
    Bar("k4v2", "bf16_share", 0.24),
    Bar("int3", "bf16_share", 0.22),
)
BUNDLED = (
    Bar("int8", "delta", 0.0005),
    Bar("fp8_e4m3", "delta", 0.0015),
    Bar("k8v4", "delta", 0.004),
    Bar("int4", "delta", 0.008),
)
# With key biases like those of Qwen2.5.
OUTLIERS = (Bar("int4", "delta", 0.01),)
REAL: Mapping[str, Sequence[Bar]] = {
    "smollm2": (
        Bar("int8", "delta", 0.0005),
        Bar("int8", "kl_mean", 5e-4),
        Bar("fp8_e4m3", "delta", 0.003),
        Bar("k8v4", "delta", 0.004),
        Bar("k8v4", "kl_mean", 2e-3),
        Bar("int4", "delta", 0.005),
        Bar("int4", "kl_mean", 7e-3),
        Bar("int4", "top1_lost", 0.04),
        Bar("k4v2", "delta", 0.015),
        Bar("k4v2", "kl_mean", 2e-2),
        Bar("int3", "delta", 0.02),
        Bar("int3", "kl_mean", 3e-2),
    ),
    QWEN: (
        Bar("int8", "delta", 0.0005),
        Bar("int4", "delta", 0.004),
        Bar("int4", "kl_mean", 2.5e-3),
        Bar("k4v2", "kl_mean", 6e-3),
    ),
}


def bars_for(args: argparse.Namespace) -> Sequence[Bar]:
    """Give the bars that a run with these arguments is judged by; losses behind a prompt, or of others, have none."""
    corpus = corpus_of(args)
    if args.shape is not None or corpus is None or args.prefill:
        return MEMORY
    if args.model is not None:
        return (*(REAL.get(args.model, ()) if not args.outliers else ()), *MEMORY)
    if corpus != "programs":  # which are all that the bundled model was trained on
        return MEMORY
    return (*(OUTLIERS if args.outliers else BUNDLED), *MEMORY)


def judge(
    bars: Sequence[Bar],
    side: Side,
    chunk: int,
    figures: Mapping[str, tuple[float, float | None, float | None]],  # metric: value, low, high
) -> list[Verdict]:
    """Give the verdict on every bar that this side is held to and for which there is a figure."""
    mine = [bar for bar in bars if bar.cache == side.cache and bar.metric in figures]
    return [Verdict(bar, side, chunk, *figures[bar.metric]) for bar in mine]
