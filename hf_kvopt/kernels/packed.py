"""Several sequences in one row of dense tensors, and the checks of attention over dense tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.checks import (
    COMPUTE_DTYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_head_dim,
    check_last_contiguous,
    check_shape,
    debug_enabled,
)
from hf_kvopt.kernels.pattern import Pattern, check_pattern


class Packed(NamedTuple):
    """Where each sequence of the row begins and ends: sequence i is [cu_seqlens[i], cu_seqlens[i + 1])."""

    cu_seqlens_q: Tensor  # [num_seqs + 1] int32
    cu_seqlens_k: Tensor  # [num_seqs + 1] int32
    max_q_len: int | None = None  # of the longest sequence; the whole row's if None

    @property
    def num_seqs(self) -> int:
        """Sequences in the row."""
        return self.cu_seqlens_q.shape[0] - 1


def check_dense(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: Packed | None) -> None:
    """Check every argument of attention over dense keys and values."""
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, *COMPUTE_DTYPES)
    batch, num_heads, _, head_dim = q.shape
    check_shape("k", k, (batch, None, None, head_dim))
    check_shape("v", v, (*k.shape[:3], None))
    check_head_dim("head_dim", head_dim)
    check_head_dim("v's head_dim", v.shape[3])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(name, tensor)
        check_dtype(name, tensor, q.dtype)
        check_device(name, tensor, q)
    if num_heads % max(1, k.shape[1]):
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {k.shape[1]}: got {num_heads}")
    check_pattern(pattern, q)
    if packed is not None:
        _check_packed(q, k, v, pattern, packed)


def _check_packed(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: Packed) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1: got {q.shape[0]}; concatenate them along q_len")
    if pattern.starts is not None or pattern.mask is not None:
        raise ValueError("packed sequences take neither starts nor mask: got one; drop the padding instead")
    for name, tensor in (("k", k), ("v", v)):
        # Where a sequence begins is computed in 32 bits.
        if tensor.shape[2] * tensor.stride(2) >= 2**31:
            raise ValueError(
                f"packed {name} must span fewer than 2**31 elements: got {tensor.shape[2]} tokens of stride "
                f"{tensor.stride(2)}; pack fewer sequences into one call"
            )
    for name, bounds, length in (
        ("cu_seqlens_q", packed.cu_seqlens_q, q.shape[2]),
        ("cu_seqlens_k", packed.cu_seqlens_k, k.shape[2]),
    ):
        check_shape(name, bounds, (packed.num_seqs + 1,))
        check_dtype(name, bounds, torch.int32)
        check_contiguous(name, bounds)
        check_device(name, bounds, q)
        if debug_enabled():
            steps = bounds.diff()
            if int(bounds[0]) != 0 or int(bounds[-1]) > length or bool((steps < 0).any()):
                raise ValueError(f"{name} must rise from 0 to at most {length}: got {bounds.tolist()}")
