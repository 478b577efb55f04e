"""Quantization in torch: used by CPU storage, and the reference that kernels are tested against.

    scale = absmax(x) / qmax              per token and KV head, rounded to `scale_dtype` first
    codes = cast(clamp(round(x / scale)))  so that a code always refers to the scale that is stored

NaN and Inf: a vector that holds a non-finite value, or whose scale does not fit `scale_dtype`, gets the scale NaN.
Every reader of that token then gets NaN, as from attention over the unquantized cache; it is never clamped to a
plausible number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.quant.formats import INT4, Format

# Half of float16's smallest step: added before rounding it makes tiny scales round up, so that no code exceeds the
# range by more than the rounding of a normal scale. float32 scales need none.
FLOAT16_NUDGE = 2.0**-25
# Candidate codes of the largest magnitude of an int4 plane, before clamping to -8.
INT4_DIVISORS = (-8.0, -8.5, -7.5, -9.0)
_DIVISORS = torch.tensor(INT4_DIVISORS).view(-1, 1, 1)
_INT4_VECTORS = 1 << 14  # vectors for which all candidates are tried at once


class Quantized(NamedTuple):
    """Codes and the scales that belong to them; `scale` is None for native storage."""

    codes: Tensor  # [..., dim / codes_per_byte]
    scale: Tensor | None = None  # [..., *scale_shape]

    @property
    def parts(self) -> list[Tensor]:
        """Tensors that are present."""
        return [self.codes] if self.scale is None else [self.codes, self.scale]


def quantize(
    x: Tensor,  # [..., dim] float
    fmt: Format,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """Quantize each vector of the last axis on its own, by the rule in the module docstring."""
    if fmt.code_dtype is None:
        return Quantized(x, None)
    fmt.packed_dim(x.shape[-1])
    x = x.float()
    if fmt is INT4:
        return _quantize_int4(x, scale_dtype)
    # The norm is the largest magnitude, or NaN if there is one.
    scale = _rounded(torch.linalg.vector_norm(x, torch.inf, dim=-1) / fmt.qmax, scale_dtype)
    # Where the scale is 0 or NaN the quotient is NaN, and any code will do: 0 is read as 0 or NaN.
    steps = (x / scale.float().unsqueeze(-1)).clamp_(-fmt.qmax, fmt.qmax).nan_to_num_(0.0)
    return Quantized((steps.round_() if fmt.mantissa_bits is None else steps).to(fmt.code_dtype), scale)


def dequantize(
    codes: Tensor,  # [..., dim / codes_per_byte]
    scale: Tensor | None,  # [..., *scale_shape]
    fmt: Format,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return codes * scale, `[..., dim]` in `dtype`, multiplied in float32."""
    if scale is None:
        return codes.to(dtype)
    if fmt is INT4:
        planes = torch.stack((codes & 15, codes >> 4), dim=-1).float().sub_(8.0)  # [..., dim / 2, 2]
        return planes.mul_(scale.float().unsqueeze(-2)).flatten(-2).to(dtype)
    numbers, factor = widen(codes, fmt)
    return numbers.mul_(scale.float().mul(factor).unsqueeze(-1)).to(dtype)


def widen(
    codes: Tensor,  # [..., dim] of a format with one code a byte
    fmt: Format,
) -> tuple[Tensor, float]:
    """Return codes in float32, and the power of two that they must still be multiplied with.

    On a CPU float8 is moved into the bits of a float16 (0.06x the time of torch's own cast of e4m3); exact for all
    codes that `quantize` makes, which are finite.
    """
    if fmt.mantissa_bits is None or codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes.float(), 1.0
    half = codes.view(torch.int8).to(torch.int16)
    half.bitwise_left_shift_(10 - fmt.mantissa_bits)
    if fmt.mantissa_bits == 2:
        return half.view(torch.float16).float(), 1.0
    # Sign, one exponent bit less than float16, and so a bias of 7 instead of 15.
    half.bitwise_and_(-0x4080)
    return half.view(torch.float16).float(), 256.0


def widen_planes(
    packed: Tensor,  # [..., dim / 2] uint8
) -> tuple[Tensor, Tensor]:
    """Return int4 codes plus 8 in float32: even and odd channels, [..., dim / 2] each."""
    return (packed & 15).float(), (packed >> 4).float()


def unpack_int4(
    packed: Tensor,  # [..., dim / 2] uint8
) -> Tensor:
    """Return the int4 codes, `[..., dim]` int8 from -8 to 7, even channel from the low nibble."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return nibbles.view(torch.int8) - 8


def _quantize_int4(x: Tensor, scale_dtype: torch.dtype) -> Quantized:
    """Quantize even and odd channels of `x` separately, each with the best of a few scales; ties take the first."""
    parts = [_quantize_int4_part(part, scale_dtype) for part in x.flatten(0, -2).split(_INT4_VECTORS)]
    codes, scale = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    return Quantized(codes.unflatten(0, x.shape[:-1]), scale.unflatten(0, x.shape[:-1]))


def _quantize_int4_part(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes and scales of [vectors, dim], with all candidate scales tried at once."""
    planes = torch.stack((x[..., 0::2], x[..., 1::2]), dim=-2)  # [vectors, 2, dim / 2]
    low, high = torch.aminmax(planes, dim=-1)
    # Signed: the largest magnitude takes the end of the range that only one sign has.
    extreme = torch.where(high > -low, high, low)
    scales = _rounded(extreme / _DIVISORS.to(x.device), scale_dtype)  # [4, vectors, 2]
    divisor = scales.float().unsqueeze(-1)
    steps = (planes / divisor).round_().clamp_(-8, 7)  # NaN where all is zero: then any code will do
    errors = (steps * divisor - planes).square_().sum(-1)
    # A NaN scale is chosen if it is the first, as for a vector with NaN, and never otherwise.
    errors[1:].nan_to_num_(nan=torch.inf, posinf=torch.inf)
    best = errors.nan_to_num_(nan=-torch.inf, posinf=torch.inf).argmin(0, keepdim=True)
    codes = steps.gather(0, best.unsqueeze(-1).expand(-1, -1, -1, planes.shape[-1]))[0]
    nibbles = codes.add_(8).nan_to_num_(8.0).to(torch.uint8)
    return nibbles[..., 0, :] | (nibbles[..., 1, :] << 4), scales.gather(0, best)[0]


def _rounded(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Return the scales as stored: rounded away from zero, NaN where they would not be finite."""
    if scale_dtype == torch.float16:
        scale = scale.add(scale.sign(), alpha=FLOAT16_NUDGE)
    scale = scale.to(scale_dtype)
    # inf - inf is NaN, and any other scale minus itself is 0.
    return (scale - scale).add_(scale)
