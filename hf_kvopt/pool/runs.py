"""Runs of adjacent rows that begin with the same blocks: beams, samples of one prompt, prompts of one beginning.

    row 0   [7][8][9][2]     \\
    row 1   [7][8][9][4]      one run of two rows that share three blocks
    row 2   [5][6][1]        \\
    row 3   [5][6][3]         one run that shares two

All runs of a batch have the same number of rows, so that they are axes of a tensor: [runs, rows, ...].
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from hf_kvopt.kernels.calls import SHARED_TILE, SharedBlocks


class Runs(NamedTuple):
    """Runs of `size` rows each, and the leading blocks that the rows of each have in common."""

    size: int
    blocks: list[int]

    @staticmethod
    def of(rows: Sequence[list[int]]) -> Runs:
        """Return the runs that save the most reads; those of one row where nothing is shared."""
        common = [_num_common(a, b) for a, b in pairwise(rows)]
        best, most = Runs(1, [0] * len(rows)), 0
        for size in range(2, len(rows) + 1) if any(common) else ():
            if len(rows) % size == 0:
                blocks = [min(common[i : i + size - 1]) for i in range(0, len(rows), size)]
                if (size - 1) * sum(blocks) > most:
                    best, most = Runs(size, blocks), (size - 1) * sum(blocks)
        return best


def shared_tokens(
    runs: Runs,
    block_size: int,
    seen: Sequence[int],  # leading tokens of each row that all of its queries see
    device: torch.device,
) -> SharedBlocks | None:
    """Return the tokens that each run shares, in whole tiles; None where no run has any."""
    limits = [min(seen[i * runs.size : (i + 1) * runs.size]) for i in range(len(runs.blocks))]
    tokens = [
        max(0, min(count * block_size, limit)) // SHARED_TILE * SHARED_TILE
        for count, limit in zip(runs.blocks, limits, strict=True)
    ]
    if not any(tokens):
        return None
    held = torch.tensor(tokens, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
    return SharedBlocks(held, max(tokens), (runs.size - 1) * sum(tokens))


def _num_common(a: list[int], b: list[int]) -> int:
    """Return how many leading blocks two rows have in common."""
    if not a or not b or a[0] != b[0]:
        return 0
    most = min(len(a), len(b))
    return bisect_left(range(1, most + 1), True, key=lambda count: a[:count] != b[:count])
