"""Runs of tiles over one row: those that are read sealed, and those that are read exact.

Sealed tiles come first, with queries and sums in the domain of the rotation; `sealed_turn` brings the sums back, once
for a program, and exact tiles go on from there, so that only one of both is held at a time.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.sealed_means import mean_dots
from hf_kvopt.kernels.triton.sealed_tile import add_sealed_values, sealed_dots, tile_base, tile_scales
from hf_kvopt.kernels.triton.tile import apply_mask, cap_scores, is_seen, softmax_step


@triton.jit
def probabilities(
    dots,  # [BLOCK_M, BLOCK_N]
    row_scale,
    cap,
    m_i,
    l_i,
    position,
    offs_n,
    kv_lo,
    kv_hi,
    window,
    reads,  # [BLOCK_M, 1] which rows read this tile; None: all
    mask_row_ptrs,
    mask_m,
    mask_len,
    stride_mask_n,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    PARTIAL: tl.constexpr,  # False: every row sees every index of the tile
):
    """Return (p, alpha, m_i, l_i) of one step of the softmax."""
    scores = cap_scores(dots, row_scale, cap, HAS_CAP)
    if PARTIAL:
        seen = is_seen(position, offs_n, kv_lo, kv_hi, window, IS_CAUSAL, HAS_WINDOW)
        if reads is not None:
            seen = seen & reads
        if mask_row_ptrs is not None:
            mask_ptrs = mask_row_ptrs + offs_n[None, :].to(tl.int64) * stride_mask_n
            reachable = mask_m & ((offs_n < kv_hi) & (offs_n < mask_len))[None, :]
            scores, seen = apply_mask(scores, seen, mask_ptrs, reachable, MASK_MIN)
        scores = tl.where(seen, scores, float("-inf"))
    return softmax_step(scores, m_i, l_i)


@triton.jit
def attend_sealed(
    run_start,
    run_end,
    q0,
    q1,
    q2,
    q3,
    total,
    row_scale,  # see `sealed_turn.turned_query`
    acc0,
    acc1,
    acc2,
    acc3,  # [BLOCK_M, V_BLOCK / planes]
    m_i,
    l_i,
    own,  # [BLOCK_M] the block that each row stands in
    position,
    kv_lo,
    kv_hi,
    table_ptr,
    k_codes_ptr,
    k_token_ptr,
    k_mean_ptr,
    means_row_ptrs,  # [BLOCK_M] products with means, by block; None: they are made here
    v_codes_ptr,
    v_token_ptr,
    mask_row_ptrs,
    mask_m,  # [BLOCK_M]
    mask_len,
    stride_mask_n,
    kv_head,
    cap,
    window,
    NUM_KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_FACTORED: tl.constexpr,
    K_BIASED: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BORDERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    PARTIAL: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    """Fold the sealed tiles [run_start, run_end) into (acc0, acc1, acc2, acc3, m_i, l_i)."""
    rows = tl.arange(0, BLOCK_N) * NUM_KV_HEADS
    # Too narrow for asynchronous copies, s is read a tile ahead by hand.
    k_s, v_s0, v_s1, v_s2, v_s3 = tile_scales(
        table_ptr, k_token_ptr, v_token_ptr, run_start, run_end, kv_head, BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N, V_GROUPS,
        V_FACTORED,
    )  # fmt: skip
    for tile_start in tl.range(run_start, run_end, BLOCK_N):
        k_next, v_next0, v_next1, v_next2, v_next3 = tile_scales(
            table_ptr, k_token_ptr, v_token_ptr, tile_start + BLOCK_N, run_end, kv_head, BLOCK_SIZE, NUM_KV_HEADS,
            BLOCK_N, V_GROUPS, V_FACTORED,
        )  # fmt: skip
        offs_n = tile_start + tl.arange(0, BLOCK_N)
        base = tile_base(table_ptr, tile_start, kv_head, BLOCK_SIZE, NUM_KV_HEADS)
        dots = sealed_dots(
            q0, q1, q2, q3, total, k_codes_ptr, base, rows, k_s, K_BITS, K_DIM, K_BIASED, PTX, Q_DTYPE
        )  # fmt: skip
        if means_row_ptrs is not None:
            means = tl.load(means_row_ptrs + tile_start // BLOCK_SIZE, mask=mask_m, other=0.0)
            dots += means[:, None]
        elif k_mean_ptr is not None:
            block = tl.load(table_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
            mean_ptr = k_mean_ptr + (block * NUM_KV_HEADS + kv_head) * K_DIM
            dots += mean_dots(q0, q1, q2, q3, mean_ptr, K_BITS, K_DIM, K_BIASED)[:, None]
        reads = None
        if HAS_BORDERS:
            reads = (own > tile_start // BLOCK_SIZE + 1)[:, None]
        p, alpha, m_i, l_i = probabilities(
            dots, row_scale, cap, m_i, l_i, position, offs_n, kv_lo, kv_hi, window, reads, mask_row_ptrs,
            mask_m[:, None], mask_len, stride_mask_n, IS_CAUSAL, HAS_WINDOW, HAS_CAP, MASK_MIN, PARTIAL,
        )  # fmt: skip
        acc0, acc1, acc2, acc3 = add_sealed_values(
            acc0, acc1, acc2, acc3, p, alpha, v_codes_ptr, v_token_ptr, base, rows, v_s0, v_s1, v_s2, v_s3, V_BITS,
            V_GROUPS, V_DIM, V_FACTORED, PTX, P_DTYPE,
        )  # fmt: skip
        k_s, v_s0, v_s1, v_s2, v_s3 = k_next, v_next0, v_next1, v_next2, v_next3
    return acc0, acc1, acc2, acc3, m_i, l_i


@triton.jit
def exact_tile(
    places_ptr,  # address of the row's places
    exact_ptr,
    new_ptr,  # [batch, num_kv_heads, tokens, DIM] states of the last tokens, or None
    new_start,  # of the head's first new token, from new_ptr on
    stride_new_m,
    past,  # tokens of the row before the new ones
    tile_start,
    loadable,  # [BLOCK_N]
    kv_head,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return exact keys or values [BLOCK_N, BLOCK] of a tile, 0 where they must not be read.

    A block behind that of the first new token lies among the new states, every other one in its place.
    """
    place = tl.load(places_ptr + tile_start // BLOCK_SIZE).to(tl.int64)
    first_ptr = exact_ptr + ((place * BLOCK_SIZE + tile_start % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * DIM
    stride = NUM_KV_HEADS * DIM
    if new_ptr is not None:
        is_new = tile_start // BLOCK_SIZE > tl.maximum(past, 0) // BLOCK_SIZE
        first_ptr = tl.where(is_new, new_ptr + new_start + (tile_start - past).to(tl.int64) * stride_new_m, first_ptr)
        stride = tl.where(is_new, stride_new_m, NUM_KV_HEADS * DIM)
    offs_d = tl.arange(0, BLOCK)[None, :]
    ptrs = first_ptr + (tl.arange(0, BLOCK_N)[:, None] * stride + offs_d)
    return tl.load(ptrs, mask=loadable[:, None] & (offs_d < DIM), other=0.0)


@triton.jit
def attend_exact(
    num_tiles,
    num_first,  # tiles of the row's first block among them
    first_start,
    exact_start,  # where the others begin
    q,  # [BLOCK_M, K_BLOCK]
    score_scale,
    acc,  # [BLOCK_M, V_BLOCK]
    m_i,
    l_i,
    own,
    position,
    kv_lo,
    kv_hi,
    sealed_lo,
    places_ptr,
    k_exact_ptr,
    k_new_ptr,
    k_new_start,
    stride_kn_m,
    v_exact_ptr,
    v_new_ptr,
    v_new_start,
    stride_vn_m,
    past,
    mask_row_ptrs,
    mask_m,  # [BLOCK_M]
    mask_len,
    stride_mask_n,
    kv_head,
    cap,
    window,
    NUM_KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BORDERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Fold exact tiles into (acc, m_i, l_i): the first ones from `first_start` on, the others from `exact_start` on."""
    for tile in tl.range(num_tiles, num_stages=1):
        tile_start = exact_start + (tile - num_first) * BLOCK_N
        tile_start = tl.where(tile < num_first, first_start + tile * BLOCK_N, tile_start)
        offs_n = tile_start + tl.arange(0, BLOCK_N)
        loadable = (offs_n >= kv_lo) & (offs_n < kv_hi)
        k = exact_tile(
            places_ptr, k_exact_ptr, k_new_ptr, k_new_start, stride_kn_m, past, tile_start, loadable, kv_head, K_DIM,
            q.shape[1], BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N,
        )  # fmt: skip
        dots = tl.dot(q, tl.trans(k.to(DTYPE)), input_precision="ieee")
        reads = None
        if HAS_BORDERS:
            reads = ((tile_start < sealed_lo) | (own <= tile_start // BLOCK_SIZE + 1))[:, None]
        p, alpha, m_i, l_i = probabilities(
            dots, score_scale, cap, m_i, l_i, position, offs_n, kv_lo, kv_hi, window, reads, mask_row_ptrs,
            mask_m[:, None], mask_len, stride_mask_n, IS_CAUSAL, HAS_WINDOW, HAS_CAP, MASK_MIN, True,
        )  # fmt: skip
        v = exact_tile(
            places_ptr, v_exact_ptr, v_new_ptr, v_new_start, stride_vn_m, past, tile_start, loadable, kv_head, V_DIM,
            acc.shape[1], BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N,
        )  # fmt: skip
        acc = tl.dot(p.to(DTYPE), v.to(DTYPE), acc * alpha[:, None], input_precision="ieee")
    return acc, m_i, l_i
