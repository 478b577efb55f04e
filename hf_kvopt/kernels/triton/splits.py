"""Splits of one attention over its keys: where each writes its part, and what it computes of the pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.triton.checks import check_contiguous, check_dtype


def of_splits(
    pattern: Pattern, q_len: int, scratch: Tensor | None, out: Tensor, lse: Tensor, num_splits: int
) -> tuple[Tensor, Tensor, Pattern]:
    """Return where the splits write their output and lse, and the pattern that each of them computes."""
    parts, part_lse = (out, lse) if num_splits == 1 else _split_scratch(scratch, out, lse, num_splits)
    # Sinks must be counted once: with several splits they join at the merge.
    own = pattern if num_splits == 1 else pattern._replace(sinks=None)
    # The last token sees all that come before: nothing to compare.
    return parts, part_lse, own._replace(is_causal=False) if q_len == 1 else own


def most_keys(pattern: Pattern, q_len: int, capacity: int) -> int:
    """Return the most keys of a row that `q_len` queries at its end see, where its table holds `capacity` tokens."""
    return capacity if pattern.window is None else min(capacity, pattern.window + q_len - 1)


def _split_scratch(scratch: Tensor | None, out: Tensor, lse: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
    """Return the parts' output and lse, views of the scratch."""
    needed = num_splits * (out.numel() + lse.numel())
    if scratch is None:
        scratch = lse.new_empty(needed)
    check_dtype("scratch", scratch, torch.float32)
    check_contiguous("scratch", scratch)
    if scratch.numel() < needed:
        raise ValueError(
            f"scratch must hold {needed} float32 elements: got {scratch.numel()}; size it with decode_scratch"
        )
    flat = scratch.view(-1)
    parts = flat[: num_splits * out.numel()].view(num_splits, *out.shape)
    return parts, flat[num_splits * out.numel() : needed].view(num_splits, *lse.shape)
