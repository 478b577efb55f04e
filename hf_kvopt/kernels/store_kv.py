"""Write new keys and values into their slots, quantizing in the same pass. One launch per layer and step.

    pool[slot // block_size, slot % block_size, head] = quantize(x[token, head])      slot -1: skipped

Rotary embedding is not fused in: attention modules of transformers rotate q and k before they call
`past_key_values.update`, so that the kernel receives rotated keys, and taking the rotation over would mean
replacing each model's forward.

Float codes are rounded here by arithmetic (to nearest, ties to even) and only then cast, so that the cast is
exact: the result does not depend on a device's rounding of fp8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.checks import (
    COMPUTE_DTYPES,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_pool,
    check_shape,
    debug_enabled,
)
from hf_kvopt.kernels.launch import Launch, Target, cdiv, next_power_of_two, target_of
from hf_kvopt.kernels.shim import tl, triton
from hf_kvopt.quant import Format, format_of, quantize
from hf_kvopt.quant.reference import FLOAT16_NUDGE

MAX_TILE = 4096  # elements of one program, so that wide models spread over several


def store_kv_reference(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Quantize with `quant.reference` and index into the pools in place; see `store_kv`."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    for x, pool, scale in ((k, k_pool, k_scale), (v, v_pool, v_scale)):
        tokens = x.transpose(1, 2).flatten(0, 1)[kept]
        scale_dtype = torch.float16 if scale is None else scale.dtype
        codes, scales = quantize(tokens, format_of(pool.dtype), scale_dtype)
        # index_put has no float8: write the bytes.
        as_bytes = pool.element_size() == 1
        flat = pool.view(-1, *pool.shape[2:])
        (flat.view(torch.uint8) if as_bytes else flat)[slots] = codes.view(torch.uint8) if as_bytes else codes
        if scale is not None and scales is not None:
            scale.view(-1, scale.shape[2])[slots] = scales


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
def _write_scale(raw, taint, scale_ptr, rows, mask_h, NUDGE: tl.constexpr):
    """Store the scales as they will be read and return (divisor, usable), both [BLOCK_H, 1]."""
    nudged = raw + tl.where(raw < 0.0, -NUDGE, NUDGE) + taint
    rounded = nudged.to(scale_ptr.dtype.element_ty).to(tl.float32)
    # Beyond float16's range the cast gives inf; every reader must see NaN.
    rounded = tl.where(tl.abs(rounded) == float("inf"), float("nan"), rounded)
    tl.store(scale_ptr + rows, rounded.to(scale_ptr.dtype.element_ty), mask=mask_h)
    usable = rounded == rounded
    divisor = tl.where(usable & (rounded != 0.0), rounded, 1.0)
    return divisor[:, None], usable[:, None]


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
    high = tl.maximum(tl.max(even, 1), tl.max(odd, 1))
    low = tl.minimum(tl.min(even, 1), tl.min(odd, 1))
    # x - x is 0 for finite channels and NaN otherwise; max and min alone may skip a NaN.
    taint = tl.sum(even - even, 1) + tl.sum(odd - odd, 1)
    raw = tl.div_rn(tl.where(high > -low, high, low), -8.0)
    divisor, usable = _write_scale(raw, taint, scale_ptr, rows, mask_h, NUDGE)
    even = tl.where(usable, tl.clamp(_round_even(tl.div_rn(even, divisor)), -8.0, 7.0), 0.0) + 8.0
    odd = tl.where(usable, tl.clamp(_round_even(tl.div_rn(odd, divisor)), -8.0, 7.0), 0.0) + 8.0
    packed = even.to(tl.int32) | (odd.to(tl.int32) << 4)
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
    raw = tl.div_rn(tl.max(tl.abs(x), 1), QMAX)
    divisor, usable = _write_scale(raw, tl.sum(x - x, 1), scale_ptr, rows, mask_h, NUDGE)
    steps = tl.where(usable, tl.clamp(tl.div_rn(x, divisor), -QMAX, QMAX), 0.0)
    if MANTISSA_BITS == 0:
        codes = _round_even(steps).to(tl.int32).to(tl.int8)
    else:
        codes = _round_to_float(steps, MANTISSA_BITS, MIN_EXPONENT).to(pool_ptr.dtype.element_ty)
    tl.store(pool_ptr + rows[:, None] * DIM + offs_d, codes, mask=mask)


@triton.jit
def _store_one(
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


@triton.jit
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    k_pool_ptr,
    v_pool_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slot_mapping_ptr,
    q_len,
    stride_k_b,
    stride_k_h,
    stride_k_m,
    stride_v_b,
    stride_v_h,
    stride_v_m,
    NUM_KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    K_NUDGE: tl.constexpr,
    V_NUDGE: tl.constexpr,
    K_QMAX: tl.constexpr,
    V_QMAX: tl.constexpr,
    K_MANTISSA_BITS: tl.constexpr,
    V_MANTISSA_BITS: tl.constexpr,
    K_MIN_EXPONENT: tl.constexpr,
    V_MIN_EXPONENT: tl.constexpr,
):
    """One program per token and group of heads."""
    pid_token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + pid_token)
    if slot >= 0:
        batch = pid_token // q_len
        token = pid_token % q_len
        offs_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        mask_h = offs_h < NUM_KV_HEADS
        rows = slot * NUM_KV_HEADS + offs_h
        k_ptrs = (k_ptr + batch * stride_k_b + token * stride_k_m + offs_h * stride_k_h)[:, None]
        v_ptrs = (v_ptr + batch * stride_v_b + token * stride_v_m + offs_h * stride_v_h)[:, None]
        _store_one(
            k_ptrs,
            k_pool_ptr,
            k_scale_ptr,
            rows,
            mask_h,
            K_DIM,
            K_BLOCK,
            K_NUDGE,
            K_QMAX,
            K_MANTISSA_BITS,
            K_MIN_EXPONENT,
        )
        _store_one(
            v_ptrs,
            v_pool_ptr,
            v_scale_ptr,
            rows,
            mask_h,
            V_DIM,
            V_BLOCK,
            V_NUDGE,
            V_QMAX,
            V_MANTISSA_BITS,
            V_MIN_EXPONENT,
        )


def plan_store_kv(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    target: Target,
) -> Launch:
    """Check the arguments and write the launch down; see `store_kv`."""
    k_format, v_format = _check(k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale, target)
    batch, num_kv_heads, q_len, k_dim = k.shape
    k_block, v_block = next_power_of_two(k_dim), next_power_of_two(v.shape[3])
    block_h = min(next_power_of_two(num_kv_heads), max(1, MAX_TILE // max(k_block, v_block)))
    args = {
        "k_ptr": k,
        "v_ptr": v,
        "k_pool_ptr": k_pool,
        "v_pool_ptr": v_pool,
        "k_scale_ptr": k_scale,
        "v_scale_ptr": v_scale,
        "slot_mapping_ptr": slot_mapping,
        "q_len": q_len,
        **dict(zip(("stride_k_b", "stride_k_h", "stride_k_m"), k.stride()[:3], strict=True)),
        **dict(zip(("stride_v_b", "stride_v_h", "stride_v_m"), v.stride()[:3], strict=True)),
        "NUM_KV_HEADS": num_kv_heads,
        "K_DIM": k_dim,
        "V_DIM": v.shape[3],
        "K_BLOCK": k_block,
        "V_BLOCK": v_block,
        "BLOCK_H": block_h,
        **_format_args("K", k_format, k_scale),
        **_format_args("V", v_format, v_scale),
    }
    return Launch(_store_kv_kernel, (batch * q_len, cdiv(num_kv_heads, block_h), 1), args, {"num_warps": 4})


def store_kv(
    k: Tensor,  # [batch, num_kv_heads, q_len, k_dim], last axis contiguous
    v: Tensor,  # [batch, num_kv_heads, q_len, v_dim]
    k_pool: Tensor,  # [num_blocks, block_size, num_kv_heads, k_dim or packed], written in place
    v_pool: Tensor,
    slot_mapping: Tensor,  # [batch * q_len] int64: block * block_size + offset, -1 to skip
    k_scale: Tensor | None = None,  # [num_blocks, block_size, num_kv_heads] float16 or float32
    v_scale: Tensor | None = None,
) -> None:
    """Scatter keys and values into their slots; two tokens must not share a slot."""
    launch = plan_store_kv(k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale, target_of(k))
    if slot_mapping.numel():
        launch.run()


def _format_args(prefix: str, fmt: Format, scale: Tensor | None) -> dict[str, float]:
    return {
        f"{prefix}_NUDGE": FLOAT16_NUDGE if scale is not None and scale.dtype == torch.float16 else 0.0,
        f"{prefix}_QMAX": fmt.qmax,
        f"{prefix}_MANTISSA_BITS": fmt.mantissa_bits or 0,
        f"{prefix}_MIN_EXPONENT": fmt.min_exponent,
    }


def _check(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    target: Target,
) -> tuple[Format, Format]:
    formats = []
    check_shape("k", k, (None, None, None, None))
    check_shape("slot_mapping", slot_mapping, (k.shape[0] * k.shape[2],))
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    check_device("slot_mapping", slot_mapping, k)
    for name, x, pool, scale in (("k", k, k_pool, k_scale), ("v", v, v_pool, v_scale)):
        check_shape(name, x, (*k.shape[:3], None))
        check_dtype(name, x, *COMPUTE_DTYPES)
        check_last_contiguous(name, x)
        check_device(f"{name}_pool", pool, k)
        fmt = check_pool(name, pool, scale, target)
        check_shape(f"{name}_pool", pool, (*k_pool.shape[:2], k.shape[1], fmt.packed_dim(x.shape[3])))
        if not fmt.has_scale:
            check_dtype(f"{name}_pool", pool, x.dtype)
        formats.append(fmt)
    if debug_enabled() and slot_mapping.numel():
        _check_slots(slot_mapping, k_pool.shape[0] * k_pool.shape[1])
    return formats[0], formats[1]


def _check_slots(slot_mapping: Tensor, num_slots: int) -> None:
    """Raise ValueError if a slot lies outside of the pool or is used twice (stops the stream)."""
    lowest, highest = int(slot_mapping.min()), int(slot_mapping.max())
    if lowest < -1 or highest >= num_slots:
        raise ValueError(
            f"slot_mapping must lie between -1 and {num_slots - 1}: got {lowest} to {highest}; "
            "reserve blocks before writing"
        )
    used = slot_mapping[slot_mapping >= 0]
    if used.unique().numel() != used.numel():
        raise ValueError("slot_mapping must name each slot once: got a slot twice; fork shared blocks first")
