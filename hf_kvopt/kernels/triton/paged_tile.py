"""One tile of attention over a block table: what paged decode and paged prefill both do per BLOCK_N keys.

A tile of rows holds every query head of one KV group: row r is query token r // GROUP, head r % GROUP of the
group, so that keys and values are read once for the group.

Quantized codes are unpacked in registers into planes (codes.py); k_scale multiplies columns of the scores, v_scale
columns of the probabilities; sums are float32. Unused planes are given as repeats of plane 0.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.codes import KEY_UNIT, key_planes, value_planes
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.tile import apply_mask, cap_scores, is_seen, softmax_step

_KEY_UNIT = tl.constexpr(KEY_UNIT)


@triton.jit
def _query_plane(
    q_row_ptrs,  # [BLOCK_M, 1] address of each row's first channel
    mask_m,  # [BLOCK_M, 1]
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # of a plane
):
    offs = tl.arange(0, BLOCK)[None, :]
    return tl.load(q_row_ptrs + (PLANES * offs + PLANE), mask=mask_m & (offs < DIM // PLANES), other=0.0)


@triton.jit
def load_query(
    q_row_ptrs,  # [BLOCK_M, 1] address of each row's first channel
    mask_m,  # [BLOCK_M, 1]
    score_scale,
    K_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_PLANES: tl.constexpr,
    K_CODES: tl.constexpr,
    K_BIASED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return (plane 0, 1, 2, 3, what products with even and with odd channels start from, what scales them)."""
    q0 = _query_plane(q_row_ptrs, mask_m, 0, K_PLANES, K_DIM, K_BLOCK // K_PLANES)
    q1, q2, q3 = q0, q0, q0
    if K_PLANES > 1:
        q1 = _query_plane(q_row_ptrs, mask_m, 1, K_PLANES, K_DIM, K_BLOCK // K_PLANES)
    if K_PLANES > 2:
        q2 = _query_plane(q_row_ptrs, mask_m, 2, K_PLANES, K_DIM, K_BLOCK // K_PLANES)
        q3 = _query_plane(q_row_ptrs, mask_m, 3, K_PLANES, K_DIM, K_BLOCK // K_PLANES)
    if K_PLANES == 1 or tl.float32 == DTYPE:
        return q0.to(DTYPE), q1.to(DTYPE), q2.to(DTYPE), q3.to(DTYPE), 0.0, 0.0, score_scale
    else:
        # Each row times a power of two that puts its greatest channel between 256 and 512: in float16 nothing that
        # counts is lost, and nothing overflows.
        q0, q1, q2, q3 = q0.to(tl.float32), q1.to(tl.float32), q2.to(tl.float32), q3.to(tl.float32)
        greatest = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
        greatest = tl.maximum(greatest, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
        exponent = greatest.to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.minimum(tl.maximum(exponent, 27 << 23), 227 << 23)  # 2^-100 to 2^100
        unit = exponent.to(tl.float32, bitcast=True)[:, None]
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None] * 256.0
        q0, q1, q2, q3 = q0 * inverse, q1 * inverse, q2 * inverse, q3 * inverse
        row_scale = unit * (score_scale / 256.0)
        even, odd = 0.0, 0.0
        if K_BIASED:
            # sum q (c + bias) = sum q c + bias sum q
            if K_CODES == "int4":
                even = (tl.sum(q0, 1) + tl.sum(q2, 1))[:, None] * (-8.0 / _KEY_UNIT)
                odd = (tl.sum(q1, 1) + tl.sum(q3, 1))[:, None] * (-8.0 / _KEY_UNIT)
                q1, q3 = q1 * 0.0625, q3 * 0.0625
            else:
                even = (tl.sum(q0, 1) + tl.sum(q1, 1))[:, None] * (-128.0 / _KEY_UNIT)
            row_scale *= _KEY_UNIT
        return q0.to(DTYPE), q1.to(DTYPE), q2.to(DTYPE), q3.to(DTYPE), even, odd, row_scale


@triton.jit
def slot_rows(
    table_ptr,  # address of the row's table
    tile_start,
    offs_n,  # [BLOCK_N] kv indices
    loadable,  # [BLOCK_N]
    kv_head,
    is_there,  # whether the tile is one of the row's; None where that is known
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return (int64 base, [BLOCK_N] offsets from it): rows of a pool seen as [slots * num_kv_heads, dim]."""
    if BLOCK_N <= BLOCK_SIZE:
        # The tile lies within one block: one scalar load, and offsets that no tile changes. Its first index is
        # aligned to BLOCK_N.
        if is_there is None:
            block = tl.load(table_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
        else:
            block = tl.load(table_ptr + tile_start // BLOCK_SIZE, mask=is_there, other=0).to(tl.int64)
        base = (block * BLOCK_SIZE + tile_start % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        return base, tl.arange(0, BLOCK_N) * NUM_KV_HEADS
    else:
        blocks = tl.load(table_ptr + offs_n // BLOCK_SIZE, mask=loadable, other=0).to(tl.int64)
        return kv_head.to(tl.int64), (blocks * BLOCK_SIZE + offs_n % BLOCK_SIZE) * NUM_KV_HEADS


@triton.jit
def load_stored(
    pool_ptr,
    base,
    rows,  # [BLOCK_N]
    loadable,  # [BLOCK_N]
    WIDTH: tl.constexpr,  # stored elements of a vector
    BLOCK_W: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Return [BLOCK_N, BLOCK_W] stored values, 0 where they must not be read."""
    offs = tl.arange(0, BLOCK_W)[None, :]
    ptrs = pool_ptr + base * WIDTH + (rows[:, None] * WIDTH + offs)
    if PARTIAL:
        return tl.load(ptrs, mask=loadable[:, None] & (offs < WIDTH), other=0.0)
    elif WIDTH == BLOCK_W:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=offs < WIDTH, other=0.0)


@triton.jit
def _scale_pair(scale_ptr, rows, loadable, CODES: tl.constexpr):
    """Return the scales of even and of odd channels: int4 has one of each, other codes one for all."""
    if CODES == "int4":
        even = tl.load(scale_ptr + 2 * rows, mask=loadable, other=0.0)
        return even, tl.load(scale_ptr + 2 * rows + 1, mask=loadable, other=0.0)
    else:
        scale = tl.load(scale_ptr + rows, mask=loadable, other=0.0)
        return scale, scale


@triton.jit
def load_scales(
    table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    tile_start,
    kv_lo,
    kv_hi,
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
):
    """Return a tile's scales, [BLOCK_N] as stored: keys' even and odd channels, values' even and odd channels.

    0.0 for native storage, and 0 for what lies outside.
    """
    k_even, k_odd, v_even, v_odd = 0.0, 0.0, 0.0, 0.0
    if k_scale_ptr is not None or v_scale_ptr is not None:
        offs_n = tile_start + tl.arange(0, BLOCK_N)
        loadable = (offs_n >= kv_lo) & (offs_n < kv_hi)
        base, rows = slot_rows(
            table_ptr, tile_start, offs_n, loadable, kv_head, tile_start < kv_hi, BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N
        )
        if k_scale_ptr is not None:
            k_even, k_odd = _scale_pair(k_scale_ptr, base + rows, loadable, K_CODES)
        if v_scale_ptr is not None:
            v_even, v_odd = _scale_pair(v_scale_ptr, base + rows, loadable, V_CODES)
    return k_even, k_odd, v_even, v_odd


@triton.jit
def attend_tile(
    q0,
    q1,
    q2,
    q3,  # [BLOCK_M, K_BLOCK / K_PLANES]
    even_start,
    odd_start,  # [BLOCK_M, 1] or 0.0: what products start from
    score_scale,  # [BLOCK_M, 1] or a number
    acc0,
    acc1,
    acc2,
    acc3,  # [BLOCK_M, V_BLOCK / V_PLANES]
    m_i,  # [BLOCK_M]
    l_i,  # [BLOCK_M], or [BLOCK_M, BLOCK_N] summed up at the end
    k_even,
    k_odd,
    v_even,
    v_odd,  # [BLOCK_N] scales of the tile, or 0.0
    position,  # [BLOCK_M] of each row's query
    tile_start,
    kv_lo,
    kv_hi,  # indices outside of [kv_lo, kv_hi) are never read
    table_ptr,
    k_ptr,
    v_ptr,
    mask_row_ptrs,  # [BLOCK_M, 1], or None
    mask_m,  # [BLOCK_M, 1]
    mask_len,
    stride_mask_n,
    kv_head,
    cap,
    window,
    NUM_KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_PLANES: tl.constexpr,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    K_BIASED: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    PARTIAL: tl.constexpr,  # False: every row sees every index of the tile
    Q_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    """Fold one tile into (acc0, acc1, acc2, acc3, m_i, l_i)."""
    offs_n = tile_start + tl.arange(0, BLOCK_N)
    loadable = (offs_n >= kv_lo) & (offs_n < kv_hi)
    base, rows = slot_rows(table_ptr, tile_start, offs_n, loadable, kv_head, None, BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N)

    k = load_stored(k_ptr, base, rows, loadable, K_DIM // K_PLANES, K_BLOCK // K_PLANES, PARTIAL)
    if K_PLANES == 1:
        dots = tl.dot(q0, tl.trans(k.to(Q_DTYPE)), input_precision="ieee")
    else:
        k0, k1, k2, k3 = key_planes(k, K_CODES, Q_DTYPE, K_BIASED, PTX and tl.float16 == Q_DTYPE)
        zeros = tl.zeros([q0.shape[0], BLOCK_N], tl.float32)
        dots = tl.dot(q0, tl.trans(k0), zeros + even_start, input_precision="ieee")
        if K_PLANES == 2:
            dots = tl.dot(q1, tl.trans(k1), dots, input_precision="ieee")
            dots *= k_even.to(tl.float32)[None, :]
        else:
            dots = tl.dot(q2, tl.trans(k2), dots, input_precision="ieee")
            odd_dots = tl.dot(q1, tl.trans(k1), zeros + odd_start, input_precision="ieee")
            odd_dots = tl.dot(q3, tl.trans(k3), odd_dots, input_precision="ieee")
            dots = dots * k_even.to(tl.float32)[None, :] + odd_dots * k_odd.to(tl.float32)[None, :]
    scores = cap_scores(dots, score_scale, cap, HAS_CAP)

    if PARTIAL:
        seen = is_seen(position, offs_n, kv_lo, kv_hi, window, IS_CAUSAL, HAS_WINDOW)
        if mask_row_ptrs is not None:
            mask_ptrs = mask_row_ptrs + offs_n[None, :].to(tl.int64) * stride_mask_n
            reachable = mask_m & (loadable & (offs_n < mask_len))[None, :]
            scores, seen = apply_mask(scores, seen, mask_ptrs, reachable, MASK_MIN)
        scores = tl.where(seen, scores, float("-inf"))

    p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i)
    v = load_stored(v_ptr, base, rows, loadable, V_DIM // V_PLANES, V_BLOCK // V_PLANES, PARTIAL)
    if V_PLANES == 1:
        acc0 = tl.dot(p.to(P_DTYPE), v.to(P_DTYPE), acc0 * alpha[:, None], input_precision="ieee")
    else:
        v0, v1, v2, v3 = value_planes(v, V_CODES, P_DTYPE, PTX and tl.bfloat16 == P_DTYPE)
        p_even = (p * v_even.to(tl.float32)[None, :]).to(P_DTYPE)
        acc0 = tl.dot(p_even, v0, acc0 * alpha[:, None], input_precision="ieee")
        if V_PLANES == 2:
            acc1 = tl.dot(p_even, v1, acc1 * alpha[:, None], input_precision="ieee")
        else:
            p_odd = (p * v_odd.to(tl.float32)[None, :]).to(P_DTYPE)
            acc1 = tl.dot(p_odd, v1, acc1 * alpha[:, None], input_precision="ieee")
            acc2 = tl.dot(p_even, v2, acc2 * alpha[:, None], input_precision="ieee")
            acc3 = tl.dot(p_odd, v3, acc3 * alpha[:, None], input_precision="ieee")
    return acc0, acc1, acc2, acc3, m_i, l_i
