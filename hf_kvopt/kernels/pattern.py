"""What an attention op computes beyond softmax(scale * q k^T) v, as one frozen value that every op takes.

Query i of a row sits at position p = kv_len - q_len + i and sees kv index j where

    j <= p if causal,   j > p - window,   j >= starts[row],   mask[row, head, i, j]

A score s becomes softcap * tanh(s / softcap); a sink is one more logit of a head that joins the softmax's denominator
and has no value. The field order is that of the registered ops, so that `*pattern` hands it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.checks import COMPUTE_DTYPES, check_device, check_dtype, check_last_contiguous, check_shape

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
        """Whether causal or full attention is all there is."""
        return all(extra is None for extra in self[2:])

    @property
    def has_mask(self) -> bool:
        """Whether an explicit mask is read."""
        return self.mask is not None


def check_pattern(pattern: Pattern, q: Tensor) -> None:
    """Raise unless the pattern suits q [batch, num_heads, q_len, head_dim]."""
    scale, _, window, softcap, sinks, starts, mask = pattern
    if not 0 < abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite and not zero: got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1: got {window}; pass None for no window")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite: got {softcap}; pass None for no cap")
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[1],))
        check_dtype("sinks", sinks, *COMPUTE_DTYPES)
        check_last_contiguous("sinks", sinks)
        check_device("sinks", sinks, q)
    if starts is not None:
        if not isinstance(starts, Tensor):
            raise TypeError(f"starts must be an int32 tensor: got {type(starts).__name__}; pass torch.tensor(starts)")
        check_shape("starts", starts, (q.shape[0],))
        check_dtype("starts", starts, torch.int32)
        check_device("starts", starts, q)
    if mask is not None:
        _check_mask(mask, *q.shape[:3])
        check_device("mask", mask, q)


def _check_mask(mask: Tensor, batch: int, num_heads: int, q_len: int) -> None:
    """Raise unless the mask broadcasts to [batch, num_heads, q_len, kv_len] and is bool or float."""
    check_dtype("mask", mask, torch.bool, *COMPUTE_DTYPES)
    full = (batch, num_heads, q_len)
    if mask.ndim != 4 or any(have not in (1, want) for have, want in zip(mask.shape[:3], full, strict=True)):
        raise ValueError(
            f"mask must have shape [{batch} or 1, {num_heads} or 1, {q_len} or 1, kv_len]: got {list(mask.shape)}; "
            "expand a 2D padding mask or pass starts"
        )


def pattern_args(pattern: Pattern) -> dict[str, Any]:
    """Return the pattern as arguments of a kernel, by parameter name; scores are in base 2."""
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    return {
        "starts_ptr": starts,
        "mask_ptr": mask,
        "sinks_ptr": sinks,
        "score_scale": scale * LOG2E if softcap is None else scale / softcap,
        "cap": 0.0 if softcap is None else softcap * LOG2E,
        "window": window or 0,
        "mask_len": 0 if mask is None else mask.shape[3],
        **_mask_strides(mask),
        "IS_CAUSAL": is_causal,
        "HAS_WINDOW": window is not None,
        "HAS_CAP": softcap is not None,
        "MASK_MIN": 0.0 if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min,
    }


def _mask_strides(mask: Tensor | None) -> dict[str, int]:
    """Return the mask's strides, 0 along every axis that broadcasts."""
    names = ("stride_mask_b", "stride_mask_h", "stride_mask_m", "stride_mask_n")
    if mask is None:
        return dict.fromkeys(names, 0)
    broadcast = [0 if n == 1 else s for n, s in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
    return dict(zip(names, (*broadcast, mask.stride(3)), strict=True))


def strides_of(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """Return the strides of the first three axes by kernel parameter, `stride_<name>_<axis>`."""
    return {f"stride_{name}_{axis}": tensor.stride(i) for i, axis in enumerate(axes)}
