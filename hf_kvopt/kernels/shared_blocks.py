"""SharedBlocks: what adjacent rows of a batch have in common, so that a kernel can read it once for all of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Shared tokens are counted in whole tiles of every kernel.
SHARED_TILE = 64


class SharedBlocks(NamedTuple):
    """Tokens of which adjacent rows hold the very same blocks, so that a kernel can read these once for all of them.

    Args:
        tokens: [runs] int32, a multiple of `SHARED_TILE`: how many leading tokens all rows of each run share. A run is
            batch // runs rows after one another. Every query sees these tokens by its position, and the rows of a run
            have the same first token that is not hidden by the pattern's `starts`.
        most: the greatest of `tokens`.
        saved: tokens that need not be read again.
    """

    tokens: Tensor
    most: int
    saved: int
