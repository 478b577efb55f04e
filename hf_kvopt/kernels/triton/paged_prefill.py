"""Attention of a chunk of queries over a block table: chunked prefill, prompts after a shared prefix, drafts.

    out = softmax(softcap(q k^T * scale) + mask) v      k, v read through the table, never gathered

A program takes BLOCK_M rows of one KV head, a row being one query token and one of the head's query heads
(row r: token r // GROUP), so that a few draft tokens of many heads fill a tile. Tiles of keys that no row of
the program may see are not visited, and only tiles on an edge (first valid index, window, diagonal, length)
are masked. An explicit mask, such as that of a draft tree, is read tile by tile.

FlashAttention-2: Dao, 2023.
"""

from __future__ import annotations

from torch import Tensor

from hf_kvopt.kernels.paged_kv import PagedKV, empty_results
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, paged_reference
from hf_kvopt.kernels.triton.arguments import paged_args, pattern_args
from hf_kvopt.kernels.triton.checks import check_paged
from hf_kvopt.kernels.triton.configs import paged_prefill_config
from hf_kvopt.kernels.triton.launch import Config, Launch, Target, cdiv, target_of
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.paged_tile import attend_tile, load_query, load_scales
from hf_kvopt.kernels.triton.tile import add_sink, log_sum, reciprocal, store_output

paged_prefill_reference = paged_reference


@triton.jit
def visit_bounds(
    first_position,  # of the tile's first query
    last_position,  # of its last
    kv_start,
    kv_len,
    window,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Return (kv_lo, whole_lo, whole_hi, kv_hi): [kv_lo, kv_hi) is visited, [whole_lo, whole_hi) needs no mask."""
    kv_lo = tl.minimum(kv_start, kv_len)
    whole_lo = kv_lo
    kv_hi = kv_len
    whole_hi = kv_len
    if HAS_WINDOW:
        whole_lo = tl.maximum(kv_lo, last_position - window + 1)
        kv_lo = tl.maximum(kv_lo, first_position - window + 1)
    if IS_CAUSAL:
        kv_hi = tl.maximum(tl.minimum(kv_len, last_position + 1), 0)
        whole_hi = tl.maximum(tl.minimum(kv_len, first_position + 1), 0)
    whole_lo = tl.minimum(tl.cdiv(whole_lo, BLOCK_N) * BLOCK_N, kv_hi)
    whole_hi = whole_hi // BLOCK_N * BLOCK_N
    if HAS_MASK:
        # No tile is whole: the right edge takes them all.
        whole_lo = kv_lo // BLOCK_N * BLOCK_N
        whole_hi = whole_lo
    return kv_lo, whole_lo, whole_hi, kv_hi


@triton.jit(do_not_specialize=["q_len", "mask_len", "stride_table_b"])
def _paged_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    block_table_ptr,
    seq_lens_ptr,
    starts_ptr,
    mask_ptr,
    sinks_ptr,
    out_ptr,  # [batch, q_len, num_heads, v_dim]
    lse_ptr,  # [batch, num_heads, q_len]
    q_len,
    score_scale,
    cap,
    window,
    mask_len,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_table_b,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    """One program per tile of rows, KV head and batch row."""
    # Last tiles first: under a causal mask they have the most to do.
    pid_m = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token = (offs_m // GROUP).to(tl.int64)  # [BLOCK_M]
    head = (kv_head * GROUP + offs_m % GROUP).to(tl.int64)
    mask_m = offs_m < q_len * GROUP

    seq_len = tl.load(seq_lens_ptr + batch)
    kv_start = 0
    if starts_ptr is not None:
        kv_start = tl.load(starts_ptr + batch)
    first_position = seq_len - q_len + pid_m * BLOCK_M // GROUP
    last_position = tl.minimum(seq_len - q_len + (pid_m * BLOCK_M + BLOCK_M - 1) // GROUP, seq_len - 1)
    kv_lo, whole_lo, whole_hi, kv_hi = visit_bounds(
        first_position, last_position, kv_start, seq_len, window, BLOCK_N, IS_CAUSAL, HAS_WINDOW, mask_ptr is not None
    )

    position = seq_len - q_len + offs_m // GROUP
    q_row_ptrs = (q_ptr + batch * stride_q_b + head * stride_q_h + token * stride_q_m)[:, None]
    q0, q1, q2, q3, even_start, odd_start, row_scale = load_query(
        q_row_ptrs, mask_m[:, None], score_scale, K_DIM, K_BLOCK, K_PLANES, K_CODES, K_BIASED, Q_DTYPE
    )
    mask_row_ptrs = None
    if mask_ptr is not None:
        mask_row_ptrs = (mask_ptr + batch * stride_mask_b + head * stride_mask_h + token * stride_mask_m)[:, None]
    table_ptr = block_table_ptr + batch * stride_table_b
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V_BLOCK // V_PLANES], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    # Three runs over one body: the left edge, whole tiles, the right edge.
    for run in tl.static_range(3):
        start = whole_lo
        end = whole_hi
        if run == 0:
            start = kv_lo // BLOCK_N * BLOCK_N
            end = whole_lo
        elif run == 2:
            start = tl.maximum(whole_lo, whole_hi)
            end = kv_hi
        if run == 2 or (mask_ptr is None and (run == 1 or HAS_WINDOW or starts_ptr is not None)):
            for tile_start in tl.range(start, end, BLOCK_N):
                k_even, k_odd, v_even, v_odd = load_scales(
                    table_ptr, k_scale_ptr, v_scale_ptr, tile_start, kv_lo, kv_hi, kv_head,
                    BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N, K_CODES, V_CODES,
                )  # fmt: skip
                acc0, acc1, acc2, acc3, m_i, l_i = attend_tile(
                    q0, q1, q2, q3, even_start, odd_start, row_scale, acc0, acc1, acc2, acc3, m_i, l_i, k_even, k_odd,
                    v_even, v_odd, position, tile_start, kv_lo, kv_hi, table_ptr, k_ptr, v_ptr,
                    mask_row_ptrs, mask_m[:, None], mask_len, stride_mask_n, kv_head, cap, window,
                    NUM_KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, K_PLANES, V_PLANES, K_CODES, V_CODES, K_BIASED, PTX,
                    BLOCK_SIZE, BLOCK_N, IS_CAUSAL, HAS_WINDOW, HAS_CAP, MASK_MIN, run != 1, Q_DTYPE, P_DTYPE,
                )  # fmt: skip
    factor = 1.0
    if sinks_ptr is not None:
        factor, m_i, l_i = add_sink(sinks_ptr, head, mask_m, m_i, l_i)
    inverse = (factor * reciprocal(l_i))[:, None]
    num_heads = NUM_KV_HEADS * GROUP
    out_row_ptrs = (out_ptr + ((batch * q_len + token) * num_heads + head) * V_DIM)[:, None]
    store_output(out_row_ptrs, mask_m[:, None], inverse, acc0, acc1, acc2, acc3, V_DIM, V_PLANES)
    tl.store(lse_ptr + (batch * num_heads + head) * q_len + token, log_sum(m_i, l_i), mask=mask_m)


def plan_paged_prefill(
    q: Tensor, kv: PagedKV, pattern: Pattern, out: Tensor, lse: Tensor, target: Target, config: Config
) -> Launch:
    """Write the launch down; see `paged_prefill`."""
    args = {**paged_args(q, kv, config, target), **pattern_args(pattern), "out_ptr": out, "lse_ptr": lse}
    batch, num_heads, q_len, _ = q.shape
    row_tiles = cdiv(q_len * num_heads // kv.num_kv_heads, config.block_m)
    return Launch(_paged_prefill_kernel, (row_tiles, kv.num_kv_heads, batch), args, config.options)


def paged_prefill(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    kv: PagedKV,
    pattern: Pattern,
    *,
    config: Config | None = None,
) -> AttentionOut:
    """Attend to each row's tokens through its table; see the module."""
    target = target_of(q)
    check_paged(q, kv, pattern, target)
    out, lse = empty_results(q, kv.v_dim)
    if out.numel():
        num_rows = q.shape[2] * q.shape[1] // kv.num_kv_heads
        widest = max(q.shape[3], kv.v_dim)
        config = config or paged_prefill_config(widest, q.dtype, kv.formats, num_rows, pattern.has_mask, target)
        plan_paged_prefill(q, kv, pattern, out, lse, target, config).run()
    return AttentionOut(out, lse)
