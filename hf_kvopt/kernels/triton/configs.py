"""Tiles and compile options of the attention kernels by GPU family, and the choice among them.

Chosen by compiled registers and shared memory (`python -m evals.kernels --all`: none of them spills); measured on no
card yet. Warp specialisation is not used: Triton 3.9 compiles it to the same machine code on sm_90 and fails on sm_100.
"""

from __future__ import annotations

import torch

from hf_kvopt.kernels.triton.launch import Config, Target, next_power_of_two
from hf_kvopt.quant import Format

_INTERPRET = Config(16, 16, 4, 1)

# family: (head_dim up to 128, above; the same with codes of a byte; the same with int4; float32)
# Decode: 16 rows or, with half the keys, 32. The block table is read two stages ahead of the keys, so that 5 stages are
# two tiles under way, 3 are one. int4 on two warps: 24 warp instructions a token where four take 33.
_PAGED_DECODE = {
    "interpret": (_INTERPRET,) * 7,
    "sm80": (
        Config(32, 64, 4, 3), Config(32, 32, 4, 3), Config(32, 64, 4, 3), Config(16, 32, 4, 3),
        Config(16, 64, 2, 3), Config(16, 32, 4, 3), Config(16, 16, 4, 2),
    ),
    "sm90": (
        Config(32, 64, 4, 5), Config(32, 32, 4, 5), Config(32, 64, 4, 5), Config(16, 32, 4, 5),
        Config(16, 64, 2, 5), Config(16, 32, 4, 5), Config(16, 16, 4, 2),
    ),
    "sm100": (
        Config(32, 64, 4, 4), Config(32, 32, 4, 5), Config(32, 64, 4, 5), Config(16, 32, 4, 5),
        Config(16, 64, 2, 5), Config(16, 32, 4, 5), Config(16, 16, 4, 2),
    ),
    "cdna3": (
        Config(32, 64, 4, 1), Config(32, 32, 4, 1), Config(32, 64, 4, 1), Config(16, 32, 4, 1),
        Config(16, 64, 4, 1), Config(16, 32, 4, 1), Config(16, 16, 4, 1),
    ),
}  # fmt: skip
_PAGED_PREFILL = {
    "interpret": (_INTERPRET,) * 7,
    "sm80": (
        Config(64, 32, 4, 2), Config(64, 32, 8, 2), Config(64, 16, 8, 2), Config(64, 16, 8, 2),
        Config(64, 16, 8, 2), Config(16, 32, 4, 2), Config(16, 16, 4, 1),
    ),
    "sm90": (
        Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 4, 2), Config(64, 16, 8, 2),
        Config(64, 32, 4, 2), Config(64, 16, 8, 2), Config(16, 16, 4, 1),
    ),
    "sm100": (
        Config(128, 64, 8, 3), Config(64, 32, 8, 3), Config(64, 32, 4, 3), Config(64, 16, 8, 2),
        Config(64, 32, 4, 2), Config(64, 16, 8, 2), Config(16, 16, 4, 1),
    ),
    "cdna3": (
        Config(128, 32, 8, 1), Config(64, 32, 4, 1), Config(64, 32, 4, 1), Config(64, 16, 8, 1),
        Config(64, 32, 4, 1), Config(64, 16, 8, 1), Config(16, 16, 4, 1),
    ),
}  # fmt: skip
# family: (head_dim up to 64, up to 128, above; the same with anything beyond causal; float32)
_FLASH_PREFILL = {
    "interpret": (_INTERPRET,) * 7,
    "sm80": (
        Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2),
        Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2),
        Config(16, 16, 4, 1),
    ),
    "sm90": (
        Config(128, 128, 8, 3, tma=True), Config(128, 128, 8, 2, tma=True), Config(128, 64, 8, 2, tma=True),
        Config(128, 64, 8, 3, tma=True), Config(128, 64, 8, 2, tma=True), Config(64, 32, 4, 2, tma=True),
        Config(16, 16, 4, 1),
    ),
    "sm100": (
        Config(128, 128, 8, 3, tma=True), Config(128, 128, 8, 2, tma=True), Config(128, 64, 8, 2, tma=True),
        Config(128, 64, 8, 3, tma=True), Config(128, 64, 8, 3, tma=True), Config(64, 32, 8, 2, tma=True),
        Config(16, 16, 4, 1),
    ),
    "cdna3": (
        Config(128, 64, 8, 1), Config(128, 64, 8, 1), Config(64, 32, 8, 1),
        Config(128, 32, 8, 1), Config(128, 32, 8, 1), Config(64, 32, 8, 1),
        Config(16, 16, 4, 1),
    ),
}  # fmt: skip
# family: (head_dim up to 128, above, float32) of few queries, the same of many. A tile lies in one block.
_SEALED = {
    "interpret": (_INTERPRET,) * 6,
    "sm80": (
        Config(16, 64, 4, 3), Config(16, 32, 4, 3), Config(16, 16, 4, 2),
        Config(16, 32, 4, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 1),
    ),
    "sm90": (
        Config(16, 64, 4, 3), Config(16, 32, 4, 3), Config(16, 16, 4, 2),
        Config(64, 16, 8, 2), Config(16, 16, 4, 2), Config(16, 16, 4, 1),
    ),
    "sm100": (
        Config(16, 64, 4, 3), Config(16, 32, 4, 3), Config(16, 16, 4, 2),
        Config(64, 16, 8, 1), Config(16, 16, 4, 2), Config(16, 16, 4, 1),
    ),
    "cdna3": (
        Config(16, 64, 4, 1), Config(16, 32, 4, 1), Config(16, 16, 4, 1),
        Config(64, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1),
    ),
}  # fmt: skip


def sealed_config(
    head_dim: int,  # the larger of k's and v's
    dtype: torch.dtype,  # of q
    block_size: int,
    num_rows: int,  # query heads of a group x q_len
    has_mask: bool,
    few: bool,  # whether the keys are split over programs
    has_groups: bool,  # whether channels of a value have several s
    target: Target,
) -> Config:
    """Return the configuration of one KV head's work over sealed blocks."""
    column = 2 if dtype == torch.float32 else int(head_dim > 128)
    config = _SEALED[target.family][column + 3 * (not few)]
    if not few:
        config = _fit(config, num_rows, has_mask)
        config = config._replace(num_stages=1) if has_groups else config
    elif has_mask:
        config = config._replace(block_n=max(16, config.block_n // 2))
    return config._replace(block_n=min(config.block_n, block_size))


def decode_config(
    head_dim: int,  # the larger of k's and v's
    dtype: torch.dtype,  # of q
    formats: tuple[Format, Format],
    num_rows: int,  # query heads of a group x q_len
    has_mask: bool,
    target: Target,
) -> Config:
    """Return the configuration of one KV head's work; more than 16 rows, or a mask, take half the keys at a time."""
    config = _PAGED_DECODE[target.family][_paged_column(head_dim, dtype, formats)]
    block_m = min(config.block_m, max(16, next_power_of_two(num_rows)))
    block_n = config.block_n // 2 if has_mask or block_m > 16 else config.block_n
    return config._replace(block_m=block_m, block_n=max(16, block_n))


def shared_config(
    head_dim: int,
    dtype: torch.dtype,
    formats: tuple[Format, Format],
    num_rows: int,  # query heads of a group x q_len x rows that share the keys
    has_mask: bool,
    target: Target,
) -> Config:
    """Return the configuration of one KV head's work for many rows over the same keys; see `decode_config`.

    64 rows a tile, with a chunk's keys, where a chunk has as many: then half as many programs read a key. Not of codes:
    on sm_100 that spills.
    """
    few = decode_config(head_dim, dtype, formats, num_rows, has_mask, target)
    many = paged_prefill_config(head_dim, dtype, formats, num_rows, has_mask, target)
    if num_rows <= few.block_m or many.block_m < 64 or any(fmt.has_scale for fmt in formats):
        return few
    return many._replace(block_m=64)


def least_decode_tile(target: Target) -> int:
    """Return the fewest keys that a tile of any decode configuration may have."""
    return min(max(16, config.block_n // 2) for config in _PAGED_DECODE[target.family])


def paged_prefill_config(
    head_dim: int, dtype: torch.dtype, formats: tuple[Format, Format], num_rows: int, has_mask: bool, target: Target
) -> Config:
    """Return the configuration of one KV head's work; arguments as in `decode_config`."""
    return _fit(_PAGED_PREFILL[target.family][_paged_column(head_dim, dtype, formats)], num_rows, has_mask)


def flash_prefill_config(
    head_dim: int,  # the larger of k's and v's
    dtype: torch.dtype,
    q_len: int,
    is_plain: bool,  # causal or full attention, and nothing else
    has_mask: bool,
    target: Target,
) -> Config:
    """Return the configuration for a head size, dtype and pattern."""
    column = 6 if dtype == torch.float32 else (head_dim > 64) + (head_dim > 128) + 3 * (not is_plain)
    return _fit(_FLASH_PREFILL[target.family][column], q_len, has_mask)


def _fit(config: Config, num_rows: int, has_mask: bool) -> Config:
    """Return the configuration for fewer rows than its tile has, and for half the keys where a mask is read.

    Up to 16 rows are a prompt of one tile of keys: nothing to load ahead.
    """
    block_m = min(config.block_m, max(16, next_power_of_two(num_rows)))
    block_n = max(16, config.block_n // 2) if has_mask else config.block_n
    num_warps = config.num_warps if block_m == config.block_m else 4
    num_stages = 1 if block_m == 16 else config.num_stages
    return config._replace(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def _paged_column(head_dim: int, dtype: torch.dtype, formats: tuple[Format, Format]) -> int:
    """Return the place in a paged kernel's list: by head size and storage, and 6 for float32."""
    if dtype == torch.float32:
        return 6
    codes_per_byte = max(fmt.codes_per_byte for fmt in formats)
    storage = codes_per_byte if any(fmt.has_scale for fmt in formats) else 0
    # int4 of 32 channels is padded to 64: as many registers as large heads need.
    return (head_dim > 128 or (storage == 2 and head_dim < 64)) + 2 * storage
