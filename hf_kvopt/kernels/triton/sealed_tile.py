"""One tile of attention over sealed blocks: products with codes of keys, and sums over codes of values.

    scores = s * (q H . code - middle * sum(q H)) + q H . mean        out += p * s * (code - middle)

Queries and sums are in the domain of the rotation H, see `sealed_turn`; `sealed_means` has the products with means. A
tile lies in one block, and a sealed block is full: all of its tokens can be loaded.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.sealed_codes import (
    load_codes,
    plane_channels,
    plane_codes,
    plane_width,
    sealed_key_planes,
    sealed_value_planes,
)


@triton.jit
def tile_base(table_ptr, tile_start, kv_head, BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """Return the row (int64) of a tile's first token in a pool seen as [slots * num_kv_heads, width]."""
    block = tl.load(table_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
    return (block * BLOCK_SIZE + tile_start % BLOCK_SIZE) * NUM_KV_HEADS + kv_head


@triton.jit
def _value_scale(ptr, rows, is_there, PLANE: tl.constexpr, GROUPS: tl.constexpr):
    return tl.load(ptr + rows * GROUPS + PLANE * GROUPS // 4, mask=is_there, other=0.0)


@triton.jit
def tile_scales(
    table_ptr,
    k_token_ptr,
    v_token_ptr,
    tile_start,
    stop,
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_FACTORED: tl.constexpr,
):
    """Return s of a tile's keys and of the planes of its values, [BLOCK_N] as stored, 0 from `stop` on."""
    block = tl.load(table_ptr + tile_start // BLOCK_SIZE, mask=tile_start < stop, other=0).to(tl.int64)
    base = (block * BLOCK_SIZE + tile_start % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
    rows = tl.arange(0, BLOCK_N) * NUM_KV_HEADS
    is_there = tile_start + tl.arange(0, BLOCK_N) < stop
    k_s = tl.load(k_token_ptr + base + rows, mask=is_there, other=0.0)
    v_s0 = k_s
    if V_FACTORED:
        v_s0 = _value_scale(v_token_ptr + base * V_GROUPS, rows, is_there, 0, V_GROUPS)
    v_s1, v_s2, v_s3 = v_s0, v_s0, v_s0
    if V_FACTORED and V_GROUPS == 4:
        v_s1 = _value_scale(v_token_ptr + base * V_GROUPS, rows, is_there, 1, V_GROUPS)
    if V_FACTORED and V_GROUPS > 1:
        v_s2 = _value_scale(v_token_ptr + base * V_GROUPS, rows, is_there, 2, V_GROUPS)
        v_s3 = v_s2
    if V_FACTORED and V_GROUPS == 4:
        v_s3 = _value_scale(v_token_ptr + base * V_GROUPS, rows, is_there, 3, V_GROUPS)
    return k_s, v_s0, v_s1, v_s2, v_s3


@triton.jit
def sealed_dots(
    q0,
    q1,
    q2,
    q3,
    total,  # [BLOCK_M, 1]
    codes_ptr,
    base,
    rows,
    s,  # [BLOCK_N]
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BIASED: tl.constexpr,
    PTX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return products [BLOCK_M, BLOCK_N] of queries with sealed keys, less those with their mean."""
    x, high = load_codes(codes_ptr, base, rows, BITS, DIM, q0.shape[1])
    k0, k1, k2, k3 = sealed_key_planes(x, high, BITS, DTYPE, BIASED, PTX and tl.float16 == DTYPE)
    dots = tl.zeros([q0.shape[0], rows.shape[0]], tl.float32) - (((1 << BITS) - 1) * 0.5) * total
    dots = tl.dot(q0, tl.trans(k0), dots, input_precision="ieee")
    dots = tl.dot(q1, tl.trans(k1), dots, input_precision="ieee")
    if BITS != 8:
        dots = tl.dot(q2, tl.trans(k2), dots, input_precision="ieee")
        dots = tl.dot(q3, tl.trans(k3), dots, input_precision="ieee")
    return dots * s.to(tl.float32)[None, :]


@triton.jit
def _restored(
    x,
    high,
    token_ptr,
    base,
    rows,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return what a plane of codes stands for, [BLOCK_N, BLOCK_W], each channel by the s of its group."""
    BLOCK_W: tl.constexpr = x.shape[1]
    is_there = (tl.arange(0, BLOCK_W) < plane_width(BITS, DIM))[None, :]
    group = plane_channels(PLANE, BITS, DIM, BLOCK_W)[None, :] // (DIM // GROUPS)
    s = tl.load(token_ptr + base * GROUPS + (rows[:, None] * GROUPS + group), mask=is_there, other=0.0)
    codes = plane_codes(x, high, PLANE, BITS).to(tl.float32)
    return ((codes - ((1 << BITS) - 1) * 0.5) * s.to(tl.float32)).to(DTYPE)


@triton.jit
def add_sealed_values(
    acc0,
    acc1,
    acc2,
    acc3,
    p,  # [BLOCK_M, BLOCK_N]
    alpha,  # [BLOCK_M]
    codes_ptr,
    token_ptr,
    base,
    rows,
    s0,
    s1,
    s2,
    s3,  # [BLOCK_N] of the planes, where they are FACTORED
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    FACTORED: tl.constexpr,  # s is the same for all channels of a plane
    PTX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the planes' sums with one more tile."""
    x, high = load_codes(codes_ptr, base, rows, BITS, DIM, acc0.shape[1])
    if FACTORED:
        v0, v1, v2, v3 = sealed_value_planes(x, high, BITS, DTYPE, PTX and tl.bfloat16 == DTYPE)
        p0 = (p * s0.to(tl.float32)[None, :]).to(DTYPE)
        p1, p2, p3 = p0, p0, p0
        if GROUPS == 4:
            p1 = (p * s1.to(tl.float32)[None, :]).to(DTYPE)
        if GROUPS > 1:
            p2 = (p * s2.to(tl.float32)[None, :]).to(DTYPE)
            p3 = p2
        if GROUPS == 4:
            p3 = (p * s3.to(tl.float32)[None, :]).to(DTYPE)
    else:
        p0 = p.to(DTYPE)
        p1, p2, p3 = p0, p0, p0
        v0 = _restored(x, high, token_ptr, base, rows, 0, BITS, GROUPS, DIM, DTYPE)
        v1 = _restored(x, high, token_ptr, base, rows, 1, BITS, GROUPS, DIM, DTYPE)
        v2, v3 = v0, v1
        if BITS != 8:
            v2 = _restored(x, high, token_ptr, base, rows, 2, BITS, GROUPS, DIM, DTYPE)
            v3 = _restored(x, high, token_ptr, base, rows, 3, BITS, GROUPS, DIM, DTYPE)
    acc0 = tl.dot(p0, v0, acc0 * alpha[:, None], input_precision="ieee")
    acc1 = tl.dot(p1, v1, acc1 * alpha[:, None], input_precision="ieee")
    if BITS != 8:
        acc2 = tl.dot(p2, v2, acc2 * alpha[:, None], input_precision="ieee")
        acc3 = tl.dot(p3, v3, acc3 * alpha[:, None], input_precision="ieee")
    return acc0, acc1, acc2, acc3
