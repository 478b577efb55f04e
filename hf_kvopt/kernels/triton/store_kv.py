"""Write new keys and values into their slots, quantizing in the same pass. One launch per layer and step.

    pool[slot // block_size, slot % block_size, head] = quantize(x[token, head])      slot -1: skipped

Rotary embedding is not fused in: attention modules of transformers rotate q and k before they call
`cache.update`, so that the kernel receives rotated keys, and taking the rotation over would mean
replacing each model's forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.triton.arguments import strides_of
from hf_kvopt.kernels.triton.checks import (
    COMPUTE_DTYPES,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_pool,
    check_shape,
    debug_enabled,
)
from hf_kvopt.kernels.triton.launch import Launch, Target, cdiv, next_power_of_two, target_of
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.prepared import Plan, run_prepared
from hf_kvopt.kernels.triton.store_tile import store_one
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
    store_plane_reference(k, k_pool, slot_mapping, k_scale)
    store_plane_reference(v, v_pool, slot_mapping, v_scale)


def store_plane_reference(
    x: Tensor,  # [batch, num_kv_heads, q_len, dim]
    pool: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None = None,
) -> None:
    """Store the keys or the values of `store_kv_reference`."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    tokens = x.transpose(1, 2).flatten(0, 1)[kept]
    scale_dtype = torch.float16 if scale is None else scale.dtype
    codes, scales = quantize(tokens, format_of(pool.dtype), scale_dtype)
    # index_put has no float8: write the bytes.
    as_bytes = pool.element_size() == 1
    flat = pool.view(-1, *pool.shape[2:])
    (flat.view(torch.uint8) if as_bytes else flat)[slots] = codes.view(torch.uint8) if as_bytes else codes
    if scale is not None and scales is not None:
        scale.view(-1, *scale.shape[2:])[slots] = scales


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
        store_one(
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
        store_one(
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
        **strides_of("k", k, "bhm"),
        **strides_of("v", v, "bhm"),
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
    k_scale: Tensor | None = None,  # [num_blocks, block_size, num_kv_heads, *scale_shape] float16 or float32
    v_scale: Tensor | None = None,
) -> None:
    """Scatter keys and values into their slots; two tokens must not share a slot."""
    inputs = (k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale)

    def plan() -> Plan:
        launch = plan_store_kv(*inputs, target_of(k))
        return Plan((launch,) if slot_mapping.numel() else (), ())

    run_prepared(inputs, "store_kv", plan)


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
