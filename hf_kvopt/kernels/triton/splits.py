"""Splits of one attention over its keys: which keys each takes, where it writes its part, and what of the pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.triton.checks import check_contiguous, check_dtype
from hf_kvopt.kernels.triton.optional import tl, triton


@triton.jit
def split_bounds(
    seq_lens_ptr,
    num_batch,
    programs_per_row,
    pid_split,
    num_splits,
    kv_lo,
    kv_hi,
    reach,  # tokens at the end of a row that its queries see at most; read under a window only
    BLOCK_BATCH: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    NUM_WORKERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Return the kv range [start, end) of this split, aligned to BLOCK_N at its start; empty if end <= start."""
    first_tile = kv_lo // BLOCK_N
    num_tiles = tl.cdiv(kv_hi, BLOCK_N) - first_tile
    offs_b = tl.arange(0, BLOCK_BATCH)
    lens = tl.load(seq_lens_ptr + offs_b, mask=offs_b < num_batch, other=0)
    if HAS_WINDOW:
        lens = tl.minimum(lens, reach)
    all_tiles = tl.sum(tl.cdiv(lens, BLOCK_N).to(tl.int64), 0) * programs_per_row
    share = tl.maximum(tl.cdiv(all_tiles, NUM_WORKERS), MIN_SPLIT_TILES)
    splits = tl.minimum(tl.cdiv(num_tiles, share), num_splits)
    # Even parts: a share of 62 of 128 tiles gives 43 + 43 + 42, not 62 + 62 + 4.
    tiles = tl.cdiv(num_tiles, tl.maximum(splits, 1)).to(tl.int32)
    start = (first_tile + pid_split * tiles) * BLOCK_N
    return start, tl.minimum(start + tiles * BLOCK_N, kv_hi)


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
