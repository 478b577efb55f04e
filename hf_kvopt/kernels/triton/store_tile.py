"""One token's heads on their way into a pool: quantized, packed and written.

Float codes are rounded here by arithmetic (to nearest, ties to even) and only then cast, so that the cast is
exact: the result does not depend on a device's rounding of fp8.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton


@triton.jit
def _round_even(x):
    # Adding 1.5 * 2^23 leaves no bit for the fraction: |x| < 2^22 rounds to nearest, ties to even.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_to_float(x, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    # The same with the magic number of x's own binade, whose exponent is read from the bits of x.
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.maximum(exponent, MIN_EXPONENT) - MANTISSA_BITS + 23 + 127
    magic = (exponent << 23).to(tl.float32, bitcast=True) * 1.5
    return (x + magic) - magic


@triton.jit
def _as_stored(raw, scale_ptr, NUDGE: tl.constexpr):
    """Return scales [BLOCK_H] as they will be read: rounded to the pool's type, NaN where that is not finite."""
    nudged = raw + tl.where(raw < 0.0, -NUDGE, NUDGE)
    rounded = nudged.to(scale_ptr.dtype.element_ty).to(tl.float32)
    # Beyond float16's range the cast gives inf; every reader must see NaN.
    return tl.where(tl.abs(rounded) == float("inf"), float("nan"), rounded)


@triton.jit
def _divisor(scale):
    """Return (divisor, usable), both [BLOCK_H, 1]: 1 where the scale is 0 or NaN."""
    usable = scale == scale
    return tl.where(usable & (scale != 0.0), scale, 1.0)[:, None], usable[:, None]


@triton.jit
def _int4_steps(x, divisor, usable):
    return tl.where(usable, tl.clamp(_round_even(tl.div_rn(x, divisor)), -8.0, 7.0), 0.0)


@triton.jit
def _int4_try(x, extreme, taint, scale_ptr, DIVISOR: tl.constexpr, NUDGE: tl.constexpr):
    """Return (codes, scale, squared error) of x [BLOCK_H, BLOCK_D / 2] where `extreme` becomes DIVISOR steps."""
    scale = _as_stored(tl.div_rn(extreme, DIVISOR) + taint, scale_ptr, NUDGE)
    divisor, usable = _divisor(scale)
    steps = _int4_steps(x, divisor, usable)
    error = steps * scale[:, None] - x
    return steps, scale, tl.sum(error * error, 1)


@triton.jit
def _int4_better(steps, scale, error, other_steps, other_scale, other_error):
    is_nearer = other_error < error
    return (
        tl.where(is_nearer[:, None], other_steps, steps),
        tl.where(is_nearer, other_scale, scale),
        tl.where(is_nearer, other_error, error),
    )


@triton.jit
def _int4_plane(
    x,  # [BLOCK_H, BLOCK_D / 2] even or odd channels, 0 where there are none
    scale_ptr,  # of the plane's scale of row 0
    rows,  # [BLOCK_H]
    mask_h,
    NUDGE: tl.constexpr,
):
    """Store the plane's scales and return its codes, 0 to 15: the nearest of INT4_DIVISORS, in their order."""
    high = tl.max(x, 1)
    low = tl.min(x, 1)
    # x - x is 0 for finite channels and NaN otherwise; max and min alone may skip a NaN.
    taint = tl.sum(x - x, 1)
    extreme = tl.where(high > -low, high, low)
    steps, scale, error = _int4_try(x, extreme, taint, scale_ptr, -8.0, NUDGE)
    a, b, c = _int4_try(x, extreme, taint, scale_ptr, -8.5, NUDGE)
    steps, scale, error = _int4_better(steps, scale, error, a, b, c)
    a, b, c = _int4_try(x, extreme, taint, scale_ptr, -7.5, NUDGE)
    steps, scale, error = _int4_better(steps, scale, error, a, b, c)
    a, b, c = _int4_try(x, extreme, taint, scale_ptr, -9.0, NUDGE)
    steps, scale, error = _int4_better(steps, scale, error, a, b, c)
    tl.store(scale_ptr + 2 * rows, scale.to(scale_ptr.dtype.element_ty), mask=mask_h)
    return steps.to(tl.int32) + 8


@triton.jit
def _store_int4(
    x_ptrs,  # [BLOCK_H, 1] address of each head's vector
    pool_ptr,
    scale_ptr,
    rows,  # [BLOCK_H] row of the pool seen as [slots * num_kv_heads, dim]
    mask_h,  # [BLOCK_H]
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUDGE: tl.constexpr,
):
    # even and odd channels apart: [BLOCK_H, BLOCK_D / 2] each
    offs_p = tl.arange(0, BLOCK_D // 2)[None, :]
    mask = mask_h[:, None] & (offs_p < DIM // 2)
    even = tl.load(x_ptrs + 2 * offs_p, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(x_ptrs + 2 * offs_p + 1, mask=mask, other=0.0).to(tl.float32)
    low_codes = _int4_plane(even, scale_ptr, rows, mask_h, NUDGE)
    high_codes = _int4_plane(odd, scale_ptr + 1, rows, mask_h, NUDGE)
    packed = low_codes | (high_codes << 4)
    tl.store(pool_ptr + rows[:, None] * (DIM // 2) + offs_p, packed.to(tl.uint8), mask=mask)


@triton.jit
def _store_bytes(
    x_ptrs,  # [BLOCK_H, 1]
    pool_ptr,
    scale_ptr,
    rows,  # [BLOCK_H]
    mask_h,  # [BLOCK_H]
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUDGE: tl.constexpr,
    QMAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
):
    # [BLOCK_H, BLOCK_D]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = mask_h[:, None] & (offs_d < DIM)
    x = tl.load(x_ptrs + offs_d, mask=mask, other=0.0).to(tl.float32)
    # x - x is 0 for finite channels and NaN otherwise; max alone may skip a NaN.
    scale = _as_stored(tl.div_rn(tl.max(tl.abs(x), 1), QMAX) + tl.sum(x - x, 1), scale_ptr, NUDGE)
    tl.store(scale_ptr + rows, scale.to(scale_ptr.dtype.element_ty), mask=mask_h)
    divisor, usable = _divisor(scale)
    steps = tl.where(usable, tl.clamp(tl.div_rn(x, divisor), -QMAX, QMAX), 0.0)
    if MANTISSA_BITS == 0:
        codes = _round_even(steps).to(tl.int32).to(tl.int8)
    else:
        codes = _round_to_float(steps, MANTISSA_BITS, MIN_EXPONENT).to(pool_ptr.dtype.element_ty)
    tl.store(pool_ptr + rows[:, None] * DIM + offs_d, codes, mask=mask)


@triton.jit
def store_one(
    x_ptrs,
    pool_ptr,
    scale_ptr,
    rows,
    mask_h,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUDGE: tl.constexpr,
    QMAX: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
):
    """Write one token's heads in the format that the pool's element type stands for."""
    if scale_ptr is None:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        mask = mask_h[:, None] & (offs_d < DIM)
        tl.store(pool_ptr + rows[:, None] * DIM + offs_d, tl.load(x_ptrs + offs_d, mask=mask), mask=mask)
    elif pool_ptr.dtype.element_ty == tl.uint8:
        _store_int4(x_ptrs, pool_ptr, scale_ptr, rows, mask_h, DIM, BLOCK_D, NUDGE)
    else:
        _store_bytes(x_ptrs, pool_ptr, scale_ptr, rows, mask_h, DIM, BLOCK_D, NUDGE, QMAX, MANTISSA_BITS, MIN_EXPONENT)
