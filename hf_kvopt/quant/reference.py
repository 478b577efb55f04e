"""Quantize and dequantize in torch: what the CPU storage uses and what the kernels are held to.

    scale = absmax(x) / qmax              per token and KV head, rounded to `scale_dtype` first
    codes = cast(clamp(round(x / scale)))  so that a code always refers to the scale that is stored

NaN and Inf: a vector that holds a non-finite value, or whose scale does not fit `scale_dtype`, gets the scale
NaN. Every reader of that token then sees NaN, as attention over the unquantized cache would; it is never
clamped into a plausible number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.quant.formats import INT4, Format

# Half of float16's smallest step: added before rounding it makes tiny scales round up, so that no code
# leaves the range by more than the rounding of a normal scale. float32 scales need none.
FLOAT16_NUDGE = 2.0**-25


class Quantized(NamedTuple):
    """Codes and the scales that belong to them; `scale` is None for native storage."""

    codes: Tensor  # [..., dim / codes_per_byte]
    scale: Tensor | None  # [...]


def quantize(
    x: Tensor,  # [..., dim] float
    fmt: Format,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """Quantize each vector of the last axis alone; see the module for the rule and for NaN and Inf."""
    if fmt.code_dtype is None:
        return Quantized(x, None)
    fmt.packed_dim(x.shape[-1])
    x = x.float()
    scale = _scales(x, fmt, scale_dtype)
    divisor = scale.float().unsqueeze(-1)
    steps = x / divisor.where(divisor != 0, 1.0)
    if fmt.mantissa_bits is not None:
        return Quantized(steps.clamp_(-fmt.qmax, fmt.qmax).to(fmt.code_dtype), scale)
    if fmt is INT4:
        nibbles = steps.round_().clamp_(-8, 7).add_(8).nan_to_num_(8.0).to(torch.uint8)
        return Quantized(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scale)
    return Quantized(steps.round_().clamp_(-fmt.qmax, fmt.qmax).nan_to_num_(0.0).to(fmt.code_dtype), scale)


def dequantize(
    codes: Tensor,  # [..., dim / codes_per_byte]
    scale: Tensor | None,  # [...]
    fmt: Format,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return codes * scale, `[..., dim]` in `dtype`, multiplied in float32."""
    if scale is None:
        return codes.to(dtype)
    values = unpack_int4(codes) if fmt is INT4 else codes
    return (values.float() * scale.float().unsqueeze(-1)).to(dtype)


def unpack_int4(
    packed: Tensor,  # [..., dim / 2] uint8
) -> Tensor:
    """Return the int4 codes, `[..., dim]` int8 from -8 to 7, even channel from the low nibble."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return nibbles.view(torch.int8) - 8


def _scales(x: Tensor, fmt: Format, scale_dtype: torch.dtype) -> Tensor:
    """Return one scale per vector, NaN where it would not be finite."""
    nudge = FLOAT16_NUDGE if scale_dtype == torch.float16 else 0.0
    if fmt is INT4:
        low, high = torch.aminmax(x, dim=-1)
        # Signed: the largest magnitude lands on -8, which the other sign does not have.
        scale = torch.where(high > -low, high / -fmt.qmax, low / -fmt.qmax)
        scale = scale + torch.where(scale < 0, -nudge, nudge)
    else:
        scale = x.abs().amax(dim=-1) / fmt.qmax + nudge
    scale = scale.to(scale_dtype)
    return scale.where(scale.isfinite(), torch.nan)
