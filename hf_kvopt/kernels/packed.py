"""Several sequences packed into one row of dense tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """Bounds of the sequences of a packed row: sequence i is [cu_seqlens[i], cu_seqlens[i + 1])."""

    cu_seqlens_q: Tensor  # [num_seqs + 1] int32
    cu_seqlens_k: Tensor  # [num_seqs + 1] int32
    max_q_len: int | None = None  # of the longest sequence; the whole row's if None

    @property
    def num_seqs(self) -> int:
        """Sequences in the row."""
        return self.cu_seqlens_q.shape[0] - 1
