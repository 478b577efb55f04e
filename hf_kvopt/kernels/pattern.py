"""Pattern of an attention: what it computes beyond softmax(scale * q k^T) v, as one frozen value that every op takes.

Query i of a row sits at position p = kv_len - q_len + i and sees kv index j where

    j <= p if causal,   j > p - window,   j >= starts[row],   mask[row, head, i, j]

A score s becomes softcap * tanh(s / softcap); a sink is one more logit of a head that joins the softmax's denominator
and has no value. The field order is that of the registered ops, so that `*pattern` hands it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LOG2E = 1.4426950408889634


class Pattern(NamedTuple):
    """Scale, order, and everything that a model may add to plain softmax attention."""

    scale: float
    is_causal: bool = True
    window: int | None = None  # keys that a query sees at most, its own included
    softcap: float | None = None
    sinks: Tensor | None = None  # [num_heads]
    # [batch] the first valid key, where a row is padded on the left: int32 for kernels, any numbers for the torch path
    starts: Tensor | Sequence[int] | None = None
    mask: Tensor | None = None  # [batch | 1, num_heads | 1, q_len | 1, kv_len] bool, or float to add

    @property
    def is_plain(self) -> bool:
        """Return whether causal or full attention is all there is."""
        return all(extra is None for extra in self[2:])

    @property
    def has_mask(self) -> bool:
        """Return whether an explicit mask is read."""
        return self.mask is not None
