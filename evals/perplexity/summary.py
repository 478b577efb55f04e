"""Perplexity of a side and what it lost against the baseline, with an interval.

    ΔPPL = exp(mean over tokens of nll_side − nll_baseline) − 1

The interval is a paired bootstrap over segments: tokens of one segment are not independent, and both sides read the
same ones (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evals._common.reading import Scores

RESAMPLES = 4000
CONFIDENCE = 0.95


class Summary(NamedTuple):
    """One side against the baseline; deltas are shares (0.01 is one per cent), KL divergences nats a token."""

    num_segments: int
    num_tokens: int
    perplexity: float
    delta: float
    delta_low: float
    delta_high: float
    kl_mean: float
    kl_low: float
    kl_high: float
    kl_p99: float
    kl_p999: float
    top1_agreement: float


def summarize(baseline: Scores, side: Scores, seed: int = 0) -> Summary:
    """Compare a side with the baseline over the same segments."""
    # Means of millions of float32 terms would lose the digits that are looked for.
    delta = (side.nll.double() - baseline.nll.double()).mean(dim=1)
    low, high = _bootstrap(delta, seed)
    kl_low, kl_high = _bootstrap(side.kl.double().mean(dim=1), seed)
    return Summary(
        num_segments=len(side.nll),
        num_tokens=side.nll.numel(),
        perplexity=math.exp(side.nll.double().mean()),
        delta=math.expm1(delta.mean()),
        delta_low=math.expm1(low),
        delta_high=math.expm1(high),
        kl_mean=float(side.kl.double().mean()),
        kl_low=kl_low,
        kl_high=kl_high,
        kl_p99=_quantile(side.kl.flatten(), 0.99),
        kl_p999=_quantile(side.kl.flatten(), 0.999),
        top1_agreement=float(side.same_top1.double().mean()),
    )


def _bootstrap(
    per_segment: Tensor,  # [num_segments] float64
    seed: int,
) -> tuple[float, float]:
    """Give the interval of the mean when segments are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(per_segment), (RESAMPLES, len(per_segment)), generator=generator)
    means = per_segment[picks].mean(dim=1)
    tail = (1 - CONFIDENCE) / 2
    return _quantile(means, tail), _quantile(means, 1 - tail)


def _quantile(values: Tensor, share: float) -> float:
    """Give the smallest value that at least `share` of them do not exceed; torch.quantile takes 16 million at most."""
    return float(values.sort().values[max(0, math.ceil(share * len(values)) - 1)])
