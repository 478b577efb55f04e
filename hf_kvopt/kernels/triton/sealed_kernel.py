"""Attention over sealed and exact blocks in one pass: a few queries split over the keys, or a chunk of queries.

    position p in block i reads block b     exact where b = 0 or b >= i - 1,     sealed where 0 < b < i - 1

A program takes BLOCK_M rows of one KV head, a row being one query token and one of the head's query heads, over a range
of keys: first those that any of its rows reads sealed, then those that any reads exact. Where its rows stand in several
blocks, the blocks between their borders are visited in both forms, and each row takes what its position says. Lengths
stay on the device. Splits, their merge and their bounds are those of `paged_decode`.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.paged_prefill import visit_bounds
from hf_kvopt.kernels.triton.sealed_means import store_mean_dots
from hf_kvopt.kernels.triton.sealed_runs import attend_exact, attend_sealed
from hf_kvopt.kernels.triton.sealed_turn import turned, turned_query
from hf_kvopt.kernels.triton.splits import split_bounds
from hf_kvopt.kernels.triton.tile import add_sink, log_sum, reciprocal, store_plane


# Sizes that change while a sequence grows or a batch shrinks must not compile the kernel anew.
@triton.jit(
    do_not_specialize=[
        "q_len", "num_batch", "row_tiles", "num_splits", "sealed_lo", "new_len", "mask_len", "stride_table_b",
        "stride_places_b",
    ]
)  # fmt: skip
def sealed_attention_kernel(
    q_ptr,
    k_codes_ptr,
    k_token_ptr,
    k_mean_ptr,
    means_ptr,  # [batch, num_heads, q_len, stride_table_b] room for products with means, or None
    k_exact_ptr,
    k_new_ptr,
    k_turn_ptr,
    v_codes_ptr,
    v_token_ptr,
    v_exact_ptr,
    v_new_ptr,
    v_turn_ptr,
    block_table_ptr,
    exact_table_ptr,
    seq_lens_ptr,
    depths_ptr,
    starts_ptr,
    mask_ptr,
    sinks_ptr,
    out_ptr,  # [num_splits, batch, q_len, num_heads, v_dim]
    lse_ptr,  # [num_splits, batch, num_heads, q_len]
    q_len,
    num_batch,
    row_tiles,
    num_splits,
    sealed_lo,  # first token that may be read sealed
    new_len,
    k_turn_scale,
    v_turn_scale,
    score_scale,
    cap,
    window,
    mask_len,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_kn_b,
    stride_kn_h,
    stride_kn_m,
    stride_vn_b,
    stride_vn_h,
    stride_vn_m,
    stride_table_b,
    stride_places_b,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    BLOCK_BATCH: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_FACTORED: tl.constexpr,
    K_BIASED: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    NUM_WORKERS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_BORDERS: tl.constexpr,  # rows of a program may stand in several blocks
    HAS_WHOLE: tl.constexpr,  # tiles that all rows see are visited without a mask
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    IN_DTYPE: tl.constexpr,  # of queries and of exact states
    Q_DTYPE: tl.constexpr,  # of products with codes of keys
    P_DTYPE: tl.constexpr,  # of products with codes of values
):
    """One program per tile of rows, KV head and split."""
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    # Last tiles first: under a causal mask they have the most to do.
    first_row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * BLOCK_M
    kv_head = tl.program_id(1)
    pid_split = tl.program_id(2)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    token = offs_m // GROUP  # [BLOCK_M]
    head = kv_head * GROUP + offs_m % GROUP
    mask_m = offs_m < q_len * GROUP

    seq_len = tl.load(seq_lens_ptr + batch)
    past = seq_len - q_len
    kv_start = 0
    if starts_ptr is not None:
        kv_start = tl.load(starts_ptr + batch)
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, q_len - 1)
    kv_lo, whole_lo, whole_hi, kv_hi = visit_bounds(
        past + first_row // GROUP, past + last_token, kv_start, seq_len, window, BLOCK_N, IS_CAUSAL, HAS_WINDOW,
        mask_ptr is not None,
    )  # fmt: skip
    start = kv_lo // BLOCK_N * BLOCK_N
    end = kv_hi
    if IS_SPLIT:
        start, end = split_bounds(
            seq_lens_ptr, num_batch, NUM_KV_HEADS * row_tiles, pid_split, num_splits, kv_lo, kv_hi,
            window + q_len - 1, BLOCK_BATCH, MIN_SPLIT_TILES, NUM_WORKERS, BLOCK_N, HAS_WINDOW,
        )  # fmt: skip

    num_heads = NUM_KV_HEADS * GROUP
    part = pid_split.to(tl.int64) * num_batch + batch
    lse_ptrs = lse_ptr + (part * num_heads + head) * q_len + token
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if (start >= end) & (num_splits > 1):
        tl.store(lse_ptrs, m_i, mask=mask_m)
    else:
        position = past + token
        stand = position
        if depths_ptr is not None:
            stand = past + tl.load(depths_ptr + token, mask=mask_m, other=0)
        own = tl.maximum(stand, 0) // BLOCK_SIZE  # [BLOCK_M] the block that each row stands in
        if HAS_BORDERS:
            last_own = tl.max(tl.where(mask_m, own, 0), 0)
            first_own = tl.min(tl.where(mask_m, own, last_own), 0)
        else:
            last_own = tl.maximum(seq_len - 1, 0) // BLOCK_SIZE
            first_own = last_own
        border = (first_own - 1) * BLOCK_SIZE  # all rows read sealed what lies before
        sealed_start = tl.maximum(start, sealed_lo)
        sealed_end = tl.minimum(end, (last_own - 1) * BLOCK_SIZE)

        q_row_ptrs = (q_ptr + batch * stride_q_b + head.to(tl.int64) * stride_q_h + token.to(tl.int64) * stride_q_m)[
            :, None
        ]
        mask_row_ptrs = None
        if mask_ptr is not None:
            mask_row_ptrs = mask_ptr + batch * stride_mask_b + head.to(tl.int64) * stride_mask_h
            mask_row_ptrs = (mask_row_ptrs + token.to(tl.int64) * stride_mask_m)[:, None]
        table_ptr = block_table_ptr + batch * stride_table_b
        places_ptr = exact_table_ptr + batch * stride_places_b
        means_row_ptrs = None
        if means_ptr is not None:
            means_row_ptrs = means_ptr + ((batch * num_heads + head) * q_len + token) * stride_table_b
        # Partial sums by column where rows are few: adding them up in each tile would stop all warps once more.
        l_i = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if BLOCK_M <= 32 else tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, V_BLOCK], tl.float32)

        if sealed_start < sealed_end:
            q0, q1, q2, q3, total, row_scale = turned_query(
                q_row_ptrs, mask_m[:, None], k_turn_ptr, k_turn_scale, score_scale, K_BITS, K_DIM, K_BLOCK, K_BIASED,
                IN_DTYPE, Q_DTYPE,
            )  # fmt: skip
            if means_ptr is not None:
                store_mean_dots(
                    means_row_ptrs, q0, q1, q2, q3, mask_m[:, None], k_mean_ptr, table_ptr,
                    sealed_start // BLOCK_SIZE, tl.cdiv(sealed_end, BLOCK_SIZE), kv_head, NUM_KV_HEADS, K_BITS,
                    K_DIM, K_BIASED,
                )  # fmt: skip
            acc0 = tl.zeros([BLOCK_M, V_BLOCK // (2 if V_BITS == 8 else 4)], tl.float32)
            acc1, acc2, acc3 = acc0, acc0, acc0
            whole_start = tl.maximum(whole_lo, sealed_start)
            whole_end = tl.maximum(whole_start, tl.minimum(whole_hi, tl.minimum(border, sealed_end)))
            # Three runs over one body: the left edge, whole tiles, and what only some rows read.
            for run in tl.static_range(3):
                run_start = sealed_start
                run_end = sealed_end
                if HAS_WHOLE:
                    if run == 0:
                        run_end = tl.minimum(whole_start, sealed_end)
                    elif run == 1:
                        run_start, run_end = whole_start, whole_end
                    else:
                        run_start = whole_end
                if run == 2 or (HAS_WHOLE and mask_ptr is None and (run == 1 or HAS_WINDOW or starts_ptr is not None)):
                    acc0, acc1, acc2, acc3, m_i, l_i = attend_sealed(
                        run_start, run_end, q0, q1, q2, q3, total, row_scale, acc0, acc1, acc2, acc3, m_i, l_i, own,
                        position, kv_lo, end, table_ptr, k_codes_ptr, k_token_ptr, k_mean_ptr, means_row_ptrs,
                        v_codes_ptr, v_token_ptr, mask_row_ptrs, mask_m, mask_len, stride_mask_n, kv_head, cap, window,
                        NUM_KV_HEADS, K_DIM, V_DIM, K_BITS, V_BITS, V_GROUPS, V_FACTORED, K_BIASED, PTX, BLOCK_SIZE,
                        BLOCK_N, HAS_BORDERS, IS_CAUSAL, HAS_WINDOW, HAS_CAP, MASK_MIN, run != 1, Q_DTYPE, P_DTYPE,
                    )  # fmt: skip
            acc = turned(acc0, acc1, acc2, acc3, v_turn_ptr, v_turn_scale, V_BITS, V_DIM, V_BLOCK, P_DTYPE)

        # Tiles of the row's first block, then those from the border on.
        exact_start = tl.maximum(start, tl.maximum(sealed_lo, border))
        num_first = tl.maximum(tl.cdiv(tl.minimum(end, sealed_lo) - start, BLOCK_N), 0)
        num_tiles = num_first + tl.maximum(tl.cdiv(end - exact_start, BLOCK_N), 0)
        if num_tiles > 0:
            offs_d = tl.arange(0, K_BLOCK)[None, :]
            q = tl.load(q_row_ptrs + offs_d, mask=mask_m[:, None] & (offs_d < K_DIM), other=0.0).to(IN_DTYPE)
            k_start = batch * stride_kn_b + kv_head.to(tl.int64) * stride_kn_h
            v_start = batch * stride_vn_b + kv_head.to(tl.int64) * stride_vn_h
            acc, m_i, l_i = attend_exact(
                num_tiles, num_first, start, exact_start, q, score_scale, acc, m_i, l_i, own, position, kv_lo, end,
                sealed_lo, places_ptr, k_exact_ptr, k_new_ptr, k_start, stride_kn_m, v_exact_ptr, v_new_ptr, v_start,
                stride_vn_m, seq_len - new_len, mask_row_ptrs, mask_m, mask_len, stride_mask_n, kv_head, cap, window,
                NUM_KV_HEADS, K_DIM, V_DIM, BLOCK_SIZE, BLOCK_N, HAS_BORDERS, IS_CAUSAL, HAS_WINDOW, HAS_CAP, MASK_MIN,
                IN_DTYPE,
            )  # fmt: skip

        if BLOCK_M <= 32:
            l_i = tl.sum(l_i, 1)
        factor = 1.0
        if sinks_ptr is not None:
            factor, m_i, l_i = add_sink(sinks_ptr, head, mask_m, m_i, l_i)
        inverse = (factor * reciprocal(l_i))[:, None]
        out_row_ptrs = (out_ptr + ((part * q_len + token) * num_heads + head) * V_DIM)[:, None]
        store_plane(out_row_ptrs, mask_m[:, None], acc * inverse, 0, 1, V_DIM)
        tl.store(lse_ptrs, log_sum(m_i, l_i), mask=mask_m)
