"""What the quantized caches have to reach on the bundled text, and which run shows it."""

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evals._common.sides import Side


class Bar(NamedTuple):
    """A figure of a cache must not exceed the limit; chunk None is any."""

    cache: str
    metric: str  # "delta", a share of the baseline's perplexity, or "bf16_share", of the bytes in bfloat16
    chunk: int | None
    limit: float


class Verdict(NamedTuple):
    """A bar with what was measured."""

    bar: Bar
    side: Side
    chunk: int
    value: float

    @property
    def is_met(self) -> bool:
        """A NaN meets no bar."""
        return self.value <= self.bar.limit


MEMORY = (
    Bar("int8", "bf16_share", None, 0.53),
    Bar("fp8_e4m3", "bf16_share", None, 0.53),
    Bar("fp8_e5m2", "bf16_share", None, 0.53),
    Bar("int4", "bf16_share", None, 0.30),
)
ORDINARY = (
    Bar("int8", "delta", 16, 0.0005),
    Bar("fp8_e4m3", "delta", 16, 0.0015),
    Bar("k8v4", "delta", 16, 0.004),
    Bar("int4", "delta", 16, 0.008),
)
OUTLIERS = (Bar("int4", "delta", 16, 0.01),)


def bars_for(args: argparse.Namespace) -> Sequence[Bar]:
    """Give the bars that a run with these arguments is judged by: losses of whole texts on the reference model only."""
    if (
        args.model is not None
        or args.shape is not None
        or args.dataset is not None
        or args.text is not None
        or args.prefill
    ):
        return MEMORY
    return (*(OUTLIERS if args.outliers else ORDINARY), *MEMORY)


def judge(bars: Sequence[Bar], side: Side, chunk: int, figures: Mapping[str, float]) -> list[Verdict]:
    """Give the verdict on every bar that this side and this chunk size are held to."""
    return [
        Verdict(bar, side, chunk, figures[bar.metric])
        for bar in bars
        if bar.cache == side.cache and bar.chunk in (None, chunk)
    ]
