"""Comparison of two runs of one scenario, up to their first difference."""

from typing import NamedTuple

import torch
from torch import Tensor

from evals.equality.scenario import Run


class Divergence(NamedTuple):
    """The first token that differs, and the margin between the baseline's two best logits there."""

    row: int
    step: int
    margin: float


class Comparison(NamedTuple):
    """Tokens that are equal before the first difference, and logits compared over the same steps."""

    num_tokens: int
    num_equal: int
    max_logit: float
    max_logit_delta: float
    noise: float
    divergence: Divergence | None

    @property
    def is_equal(self) -> bool:
        """Return whether every token is equal and no logit moved by more than noise (a NaN counts as moved)."""
        return self.divergence is None and self.max_logit_delta <= self.noise * self.max_logit


def compare(
    baseline: Run,
    run: Run,
    noise: float,  # share of the largest logit that rounding may move
) -> Comparison:
    """Compare row by row, up to a row's first difference: after it the inputs differ."""
    firsts = [_first_difference(a, b) for a, b in zip(baseline.tokens, run.tokens, strict=True)]
    width = max(baseline.tokens.shape[1], run.tokens.shape[1])
    parted = [(width if step is None else step) for step in firsts]
    earliest = min(range(len(parted)), key=parted.__getitem__)
    deltas = [_row_delta(baseline, run, row, step) for row, step in enumerate(parted)]
    return Comparison(
        num_tokens=baseline.tokens.numel(),
        num_equal=sum(min(step, baseline.tokens.shape[1]) for step in parted),
        max_logit=float(baseline.logits.nan_to_num(0.0, 0.0, 0.0).abs().max()),
        max_logit_delta=float(torch.stack(deltas).max()),
        noise=noise,
        divergence=_divergence(baseline, earliest, firsts[earliest]),
    )


def _first_difference(a: Tensor, b: Tensor) -> int | None:
    """Return the first step at which two rows differ; a row that ends earlier differs where it ends."""
    common = min(len(a), len(b))
    unequal = (a[:common] != b[:common]).nonzero()
    if len(unequal):
        return int(unequal[0])
    return None if len(a) == len(b) else common


def _row_delta(baseline: Run, run: Run, row: int, parted: int) -> Tensor:  # scalar
    """Return a row's largest logit difference up to its first differing step, whose inputs are still equal."""
    steps = min(parted + 1, int(baseline.lengths[row]), int(run.lengths[row]))
    a, b = baseline.logits[:steps, row], run.logits[:steps, row]
    # Equal infinities differ by NaN, which would hide a NaN that matters.
    return (a - b).abs().masked_fill(a == b, 0.0).max() if steps else torch.tensor(0.0)


def _divergence(baseline: Run, row: int, step: int | None) -> Divergence | None:
    if step is None:
        return None
    if step >= int(baseline.lengths[row]):
        return Divergence(row, step, float("nan"))
    best, second = baseline.logits[step, row].topk(2).values.tolist()
    return Divergence(row, step, best - second)
