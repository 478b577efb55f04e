"""One tile of attention over a block table: what paged decode and paged prefill both do per BLOCK_N keys.

A tile of rows holds every query head of one KV group: row r is query token r // GROUP, head r % GROUP of the
group, so that keys and values are read once for the group.

Quantized codes are turned into the operand type in registers (exactly: at most 8 significant bits), k_scale
multiplies columns of the scores, v_scale columns of the probabilities; sums are float32. int4 keeps even and
odd channels apart, each with a scale: two products for the scores, two accumulators for the output, and no
interleaving.
"""

from __future__ import annotations

from hf_kvopt.kernels.shim import tl, triton
from hf_kvopt.kernels.tile import apply_mask, as_operand, cap_scores, high_nibble, is_seen, low_nibble, softmax_step


@triton.jit
def load_query(
    q_row_ptrs,  # [BLOCK_M, 1] address of each row's first channel
    mask_m,  # [BLOCK_M, 1]
    K_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_INT4: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the queries as (even, odd) channels for int4 keys, as (all, all) otherwise."""
    if K_INT4:
        offs = tl.arange(0, K_BLOCK // 2)[None, :]
        mask = mask_m & (offs < K_DIM // 2)
        even = tl.load(q_row_ptrs + 2 * offs, mask=mask, other=0.0).to(DTYPE)
        odd = tl.load(q_row_ptrs + 2 * offs + 1, mask=mask, other=0.0).to(DTYPE)
        return even, odd
    else:
        offs = tl.arange(0, K_BLOCK)[None, :]
        q = tl.load(q_row_ptrs + offs, mask=mask_m & (offs < K_DIM), other=0.0).to(DTYPE)
        return q, q


@triton.jit
def slot_rows(
    table_ptr,  # address of the row's table
    tile_start,
    offs_n,  # [BLOCK_N] kv indices
    loadable,  # [BLOCK_N]
    kv_head,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return [BLOCK_N] int64: the row of each kv index in a pool seen as [slots * num_kv_heads, dim]."""
    if BLOCK_N <= BLOCK_SIZE:
        # The tile lies within one block: one scalar load. Its first index is aligned to BLOCK_N.
        block = tl.load(table_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
        slots = block * BLOCK_SIZE + offs_n % BLOCK_SIZE
    else:
        blocks = tl.load(table_ptr + offs_n // BLOCK_SIZE, mask=loadable, other=0).to(tl.int64)
        slots = blocks * BLOCK_SIZE + offs_n % BLOCK_SIZE
    return slots * NUM_KV_HEADS + kv_head


@triton.jit
def load_stored(
    pool_ptr,
    rows,  # [BLOCK_N]
    loadable,  # [BLOCK_N]
    WIDTH: tl.constexpr,  # stored elements of a vector
    BLOCK_W: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Return [BLOCK_N, BLOCK_W] stored values, 0 where they must not be read."""
    offs = tl.arange(0, BLOCK_W)[None, :]
    ptrs = pool_ptr + rows[:, None] * WIDTH + offs
    if PARTIAL:
        return tl.load(ptrs, mask=loadable[:, None] & (offs < WIDTH), other=0.0)
    elif WIDTH == BLOCK_W:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=offs < WIDTH, other=0.0)


@triton.jit
def load_scale(scale_ptrs, loadable):
    """Return scales [1, BLOCK_N] in float32, 0 where they must not be read."""
    return tl.load(scale_ptrs, mask=loadable, other=0.0).to(tl.float32)[None, :]


@triton.jit
def attend_tile(
    q_even,
    q_odd,  # [BLOCK_M, K_BLOCK], or its halves for int4 keys
    acc_even,
    acc_odd,  # [BLOCK_M, V_BLOCK], or its halves for int4 values
    m_i,
    l_i,  # [BLOCK_M]
    position,  # [BLOCK_M] of each row's query
    tile_start,
    kv_lo,
    kv_hi,  # indices outside of [kv_lo, kv_hi) are never read
    table_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    mask_row_ptrs,  # [BLOCK_M, 1], or None
    mask_m,  # [BLOCK_M, 1]
    mask_len,
    stride_mask_n,
    kv_head,
    score_scale,
    cap,
    window,
    NUM_KV_HEADS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BLOCK_W: tl.constexpr,
    V_BLOCK_W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    PARTIAL: tl.constexpr,  # False: every row sees every index of the tile
    P_DTYPE: tl.constexpr,
):
    """Fold one tile into (acc_even, acc_odd, m_i, l_i)."""
    offs_n = tile_start + tl.arange(0, BLOCK_N)
    loadable = (offs_n >= kv_lo) & (offs_n < kv_hi)
    rows = slot_rows(table_ptr, tile_start, offs_n, loadable, kv_head, BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N)

    k = load_stored(k_ptr, rows, loadable, K_WIDTH, K_BLOCK_W, PARTIAL)
    if k_ptr.dtype.element_ty == tl.uint8:
        dots = tl.dot(q_even, tl.trans(low_nibble(k, q_even.dtype)), input_precision="ieee")
        dots *= load_scale(k_scale_ptr + 2 * rows, loadable)
        odd_dots = tl.dot(q_odd, tl.trans(high_nibble(k, q_even.dtype)), input_precision="ieee")
        dots += odd_dots * load_scale(k_scale_ptr + 2 * rows + 1, loadable)
    else:
        dots = tl.dot(q_even, tl.trans(as_operand(k, q_even.dtype)), input_precision="ieee")
        if k_scale_ptr is not None:
            dots *= load_scale(k_scale_ptr + rows, loadable)
    scores = cap_scores(dots, score_scale, cap, HAS_CAP)

    if PARTIAL:
        seen = is_seen(position, offs_n, kv_lo, kv_hi, window, IS_CAUSAL, HAS_WINDOW)
        if mask_row_ptrs is not None:
            mask_ptrs = mask_row_ptrs + offs_n[None, :].to(tl.int64) * stride_mask_n
            reachable = mask_m & (loadable & (offs_n < mask_len))[None, :]
            scores, seen = apply_mask(scores, seen, mask_ptrs, reachable, MASK_MIN)
        scores = tl.where(seen, scores, float("-inf"))

    p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i)
    v = load_stored(v_ptr, rows, loadable, V_WIDTH, V_BLOCK_W, PARTIAL)
    if v_ptr.dtype.element_ty == tl.uint8:
        p_even = (p * load_scale(v_scale_ptr + 2 * rows, loadable)).to(P_DTYPE)
        acc_even = tl.dot(p_even, low_nibble(v, P_DTYPE), acc_even * alpha[:, None], input_precision="ieee")
        p_odd = (p * load_scale(v_scale_ptr + 2 * rows + 1, loadable)).to(P_DTYPE)
        acc_odd = tl.dot(p_odd, high_nibble(v, P_DTYPE), acc_odd * alpha[:, None], input_precision="ieee")
    else:
        if v_scale_ptr is not None:
            p *= load_scale(v_scale_ptr + rows, loadable)
        acc_even = tl.dot(p.to(P_DTYPE), as_operand(v, P_DTYPE), acc_even * alpha[:, None], input_precision="ieee")
    return acc_even, acc_odd, m_i, l_i


@triton.jit
def store_output(
    out_row_ptrs,  # [BLOCK_M, 1]
    mask_m,  # [BLOCK_M, 1]
    acc_even,
    acc_odd,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_INT4: tl.constexpr,
):
    """Write the accumulators, the halves of int4 values to even and odd channels."""
    if V_INT4:
        offs = tl.arange(0, V_BLOCK // 2)[None, :]
        mask = mask_m & (offs < V_DIM // 2)
        tl.store(out_row_ptrs + 2 * offs, acc_even.to(out_row_ptrs.dtype.element_ty), mask=mask)
        tl.store(out_row_ptrs + 2 * offs + 1, acc_odd.to(out_row_ptrs.dtype.element_ty), mask=mask)
    else:
        offs = tl.arange(0, V_BLOCK)[None, :]
        tl.store(out_row_ptrs + offs, acc_even.to(out_row_ptrs.dtype.element_ty), mask=mask_m & (offs < V_DIM))
