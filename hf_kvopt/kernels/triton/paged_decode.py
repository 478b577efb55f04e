"""Attention of one or a few new queries a row over a block table, split over the KV length (flash-decoding).

    part s of a row:  softmax over its tiles, written with its log-sum-exp
    merge:            out = sum_s exp(lse_s - lse) out_s          (merge_state.py, which also adds the sinks)

The launch grid is (row tiles, KV heads, splits), fixed by the table's capacity and the batch. How many splits a row
really uses is derived on the device from `seq_lens`: each working program gets about an equal share of the batch's
tiles, so that one long row among short ones is spread over more programs, and a program without a share leaves after
writing an lse of -inf. Nothing on the host depends on a length: a CUDA graph stays right when lengths change.
PagedAttention: Kwon et al., 2023. Flash-decoding: Dao et al., 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.paged_kv import PagedKV, empty_results
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, paged_reference
from hf_kvopt.kernels.triton.arguments import paged_args, pattern_args
from hf_kvopt.kernels.triton.checks import check_paged
from hf_kvopt.kernels.triton.configs import decode_config, least_decode_tile
from hf_kvopt.kernels.triton.launch import Config, Launch, Target, cdiv, next_power_of_two, target_of
from hf_kvopt.kernels.triton.merge_state import plan_merge_state
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.paged_tile import attend_tile, load_query, load_scales
from hf_kvopt.kernels.triton.prepared import Plan, run_prepared
from hf_kvopt.kernels.triton.splits import most_keys, of_splits
from hf_kvopt.kernels.triton.tile import add_sink, log_sum, reciprocal, store_output

paged_decode_reference = paged_reference

# Splits that one row can be spread over, the grid's programs per multiprocessor at most, and the working
# programs per multiprocessor that the shares aim at.
MAX_SPLITS, GRID_PER_SM, WORKERS_PER_SM = 128, 32, 8
MIN_TILES = 2  # of one split: less would be lost to writing and merging its part


@triton.jit
def _split_bounds(
    seq_lens_ptr,
    num_batch,
    programs_per_row,
    pid_split,
    num_splits,
    kv_lo,
    kv_hi,
    reach,  # tokens at the end of a row that its queries see at most; read under a window only
    BLOCK_BATCH: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    NUM_WORKERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Return the kv range [start, end) of this split, aligned to BLOCK_N at its start; empty if end <= start."""
    first_tile = kv_lo // BLOCK_N
    num_tiles = tl.cdiv(kv_hi, BLOCK_N) - first_tile
    offs_b = tl.arange(0, BLOCK_BATCH)
    lens = tl.load(seq_lens_ptr + offs_b, mask=offs_b < num_batch, other=0)
    if HAS_WINDOW:
        lens = tl.minimum(lens, reach)
    all_tiles = tl.sum(tl.cdiv(lens, BLOCK_N).to(tl.int64), 0) * programs_per_row
    share = tl.maximum(tl.cdiv(all_tiles, NUM_WORKERS), MIN_SPLIT_TILES)
    splits = tl.minimum(tl.cdiv(num_tiles, share), num_splits)
    # Even parts: a share of 62 of 128 tiles gives 43 + 43 + 42, not 62 + 62 + 4.
    tiles = tl.cdiv(num_tiles, tl.maximum(splits, 1)).to(tl.int32)
    start = (first_tile + pid_split * tiles) * BLOCK_N
    return start, tl.minimum(start + tiles * BLOCK_N, kv_hi)


# Sizes that change while a sequence grows or a batch shrinks must not compile the kernel anew.
@triton.jit(
    do_not_specialize=[
        "q_len", "num_batch", "row_tiles", "num_splits", "run", "mask_len", "stride_lse_h", "stride_lse_m",
        "stride_table_b",
    ]
)  # fmt: skip
def _paged_decode_kernel(
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
    out_ptr,  # [num_splits, batch, q_len, num_heads, v_dim]
    lse_ptr,  # [num_splits, batch, num_heads, q_len], the last two in any order
    shared_ptr,  # [batch / run] int32: leading tokens that others attend to, see cascade.py
    run,
    q_len,
    num_batch,
    row_tiles,
    num_splits,
    score_scale,
    cap,
    window,
    mask_len,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_lse_h,
    stride_lse_m,
    stride_table_b,
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
    K_PLANES: tl.constexpr,
    V_PLANES: tl.constexpr,
    K_CODES: tl.constexpr,
    V_CODES: tl.constexpr,
    K_BIASED: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    NUM_WORKERS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
):
    """One program per tile of rows, KV head and split."""
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    first_row = tl.program_id(0) % row_tiles * BLOCK_M
    kv_head = tl.program_id(1)
    pid_split = tl.program_id(2)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    token = offs_m // GROUP  # [BLOCK_M]
    head = kv_head * GROUP + offs_m % GROUP
    mask_m = offs_m < q_len * GROUP

    seq_len = tl.load(seq_lens_ptr + batch)
    kv_lo = 0
    if HAS_WINDOW:
        kv_lo = tl.maximum(seq_len - q_len + first_row // GROUP - window + 1, 0)
    if starts_ptr is not None:
        kv_lo = tl.maximum(kv_lo, tl.load(starts_ptr + batch))
    if shared_ptr is not None:
        kv_lo = tl.maximum(kv_lo, tl.load(shared_ptr + batch // run))
    kv_lo = tl.minimum(kv_lo, seq_len)
    start, end = _split_bounds(
        seq_lens_ptr, num_batch, NUM_KV_HEADS * row_tiles, pid_split, num_splits, kv_lo, seq_len,
        window + q_len - 1, BLOCK_BATCH, MIN_SPLIT_TILES, NUM_WORKERS, BLOCK_N, HAS_WINDOW,
    )  # fmt: skip

    num_heads = NUM_KV_HEADS * GROUP
    part = pid_split.to(tl.int64) * num_batch + batch
    lse_ptrs = lse_ptr + part * num_heads * q_len + head * stride_lse_h + token * stride_lse_m
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if (start >= end) & (num_splits > 1):
        tl.store(lse_ptrs, m_i, mask=mask_m)
    else:
        position = seq_len - q_len + token
        q_row_ptrs = (q_ptr + batch * stride_q_b + head.to(tl.int64) * stride_q_h + token * stride_q_m)[:, None]
        q0, q1, q2, q3, even_start, odd_start, row_scale = load_query(
            q_row_ptrs, mask_m[:, None], score_scale, K_DIM, K_BLOCK, K_PLANES, K_CODES, K_BIASED, Q_DTYPE
        )
        mask_row_ptrs = None
        if mask_ptr is not None:
            mask_row_ptrs = mask_ptr + batch * stride_mask_b + head.to(tl.int64) * stride_mask_h
            mask_row_ptrs = (mask_row_ptrs + token.to(tl.int64) * stride_mask_m)[:, None]
        table_ptr = block_table_ptr + batch * stride_table_b
        # Partial sums by column: adding them up in each tile would stop all warps once more.
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc0 = tl.zeros([BLOCK_M, V_BLOCK // V_PLANES], tl.float32)
        acc1, acc2, acc3 = acc0, acc0, acc0
        # Too narrow for asynchronous copies, scales are read a tile ahead by hand.
        k_even, k_odd, v_even, v_odd = load_scales(
            table_ptr, k_scale_ptr, v_scale_ptr, start, kv_lo, end, kv_head, BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N,
            K_CODES, V_CODES,
        )  # fmt: skip
        for tile_start in tl.range(start, end, BLOCK_N):
            k_even_next, k_odd_next, v_even_next, v_odd_next = load_scales(
                table_ptr, k_scale_ptr, v_scale_ptr, tile_start + BLOCK_N, kv_lo, end, kv_head,
                BLOCK_SIZE, NUM_KV_HEADS, BLOCK_N, K_CODES, V_CODES,
            )  # fmt: skip
            acc0, acc1, acc2, acc3, m_i, sums = attend_tile(
                q0, q1, q2, q3, even_start, odd_start, row_scale, acc0, acc1, acc2, acc3, m_i, sums, k_even, k_odd,
                v_even, v_odd, position, tile_start, kv_lo, end, table_ptr, k_ptr, v_ptr,
                mask_row_ptrs, mask_m[:, None], mask_len, stride_mask_n, kv_head, cap, window,
                NUM_KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, K_PLANES, V_PLANES, K_CODES, V_CODES, K_BIASED, PTX,
                BLOCK_SIZE, BLOCK_N, IS_CAUSAL, HAS_WINDOW, HAS_CAP, MASK_MIN, True, Q_DTYPE, P_DTYPE,
            )  # fmt: skip
            k_even, k_odd, v_even, v_odd = k_even_next, k_odd_next, v_even_next, v_odd_next
        l_i = tl.sum(sums, 1)
        factor = 1.0
        if sinks_ptr is not None:
            factor, m_i, l_i = add_sink(sinks_ptr, head, mask_m, m_i, l_i)
        inverse = (factor * reciprocal(l_i))[:, None]
        out_row_ptrs = (out_ptr + ((part * q_len + token) * num_heads + head) * V_DIM)[:, None]
        store_output(out_row_ptrs, mask_m[:, None], inverse, acc0, acc1, acc2, acc3, V_DIM, V_PLANES)
        tl.store(lse_ptrs, log_sum(m_i, l_i), mask=mask_m)


def choose_splits(
    batch: int,
    num_kv_heads: int,
    row_tiles: int,
    num_keys: int,  # of a row that its queries can see: what the table can hold, or a window of it
    block_n: int,
    target: Target,
) -> int:
    """Return the splits of the grid: fixed by capacity and window, never by a length."""
    if target.family == "interpret":
        return max(1, min(3, cdiv(num_keys, block_n)))
    by_grid = max(1, GRID_PER_SM * target.num_sms // max(1, batch * num_kv_heads * row_tiles))
    return max(1, min(MAX_SPLITS, by_grid, cdiv(num_keys, block_n * MIN_TILES)))


def plan_paged_decode(
    q: Tensor,
    kv: PagedKV,
    pattern: Pattern,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor | None,
    target: Target,
    config: Config,
    num_splits: int,
) -> list[Launch]:
    """Write the launches down: the splits, and their merge if there is more than one."""
    parts, part_lse, own = of_splits(pattern, q.shape[2], scratch, out, lse, num_splits)
    launches = [plan_splits(q, kv._replace(shared=None), own, parts, part_lse, target, config, num_splits)]
    if num_splits > 1:
        launches.append(plan_merge_state(parts, part_lse, pattern.sinks, out, lse))
    return launches


def plan_splits(
    q: Tensor,
    kv: PagedKV,
    pattern: Pattern,
    parts: Tensor,  # [num_splits, batch, q_len, num_heads, v_dim], or without the first axis where it is one
    part_lse: Tensor,  # [num_splits, batch, num_heads, q_len], the last two in any order
    target: Target,
    config: Config,
    num_splits: int,
    workers_per_sm: int = WORKERS_PER_SM,
) -> Launch:
    """Write down the launch that computes the parts, of each row behind the tokens that it shares."""
    batch, num_heads, q_len, _ = q.shape
    row_tiles = cdiv(q_len * num_heads // kv.num_kv_heads, config.block_m)
    args = {
        **paged_args(q, kv, config, target),
        **pattern_args(pattern),
        "out_ptr": parts,
        "lse_ptr": part_lse,
        "stride_lse_h": part_lse.stride(-2),
        "stride_lse_m": part_lse.stride(-1),
        "shared_ptr": kv.shared,
        "run": 1 if kv.shared is None else batch // len(kv.shared),
        "num_batch": batch,
        "row_tiles": row_tiles,
        "num_splits": num_splits,
        "BLOCK_BATCH": next_power_of_two(batch),
        "MIN_SPLIT_TILES": 1 if target.family == "interpret" else MIN_TILES,
        "NUM_WORKERS": workers_per_sm * target.num_sms,
    }
    grid = (batch * row_tiles, kv.num_kv_heads, num_splits)
    return Launch(_paged_decode_kernel, grid, args, config.options, ("out_ptr", "lse_ptr"))


def decode_scratch(
    q: Tensor,  # [batch, num_heads, q_len, head_dim] of the largest call
    num_kv_heads: int,
    v_dim: int,
    capacity: int,  # tokens that a row's table can hold
) -> Tensor:
    """Allocate scratch that suits every `paged_decode` with these sizes, once for all layers, formats and steps."""
    batch, num_heads, q_len, _ = q.shape
    target = target_of(q)
    # The smallest tiles that a configuration may have give the most splits; more row tiles only give fewer.
    num_splits = choose_splits(batch, num_kv_heads, 1, capacity, least_decode_tile(target), target)
    return q.new_empty(num_splits * batch * num_heads * q_len * (v_dim + 1), dtype=torch.float32)


def paged_decode(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    kv: PagedKV,
    pattern: Pattern,
    *,
    scratch: Tensor | None = None,  # float32, see decode_scratch
    config: Config | None = None,
    num_splits: int | None = None,
) -> AttentionOut:
    """Attend to all tokens of each row through its table, whatever rows share (cascade.py reads that once).

    Nothing on the host depends on a length.
    """

    def plan() -> Plan:
        return _planned(q, kv, pattern, scratch, config, num_splits)

    inputs = (q, *kv, pattern.sinks, pattern.starts, pattern.mask, scratch)
    out, lse = run_prepared(inputs, ("paged_decode", *pattern[:4], config, num_splits), plan)
    return AttentionOut(out, lse)


def _planned(
    q: Tensor, kv: PagedKV, pattern: Pattern, scratch: Tensor | None, config: Config | None, num_splits: int | None
) -> Plan:
    """Check the arguments of `paged_decode`, choose the tiles and splits, and write the launches down."""
    target = target_of(q)
    check_paged(q, kv, pattern, target)
    out, lse = empty_results(q, kv.v_dim)
    if not out.numel():
        return Plan((), (out, lse))
    batch, num_heads, q_len, k_dim = q.shape
    num_rows = q_len * num_heads // kv.num_kv_heads
    config = config or decode_config(max(k_dim, kv.v_dim), q.dtype, kv.formats, num_rows, pattern.has_mask, target)
    if num_splits is None:
        row_tiles = cdiv(num_rows, config.block_m)
        keys = most_keys(pattern, q_len, kv.capacity)
        num_splits = choose_splits(batch, kv.num_kv_heads, row_tiles, keys, config.block_n, target)
    launches = plan_paged_decode(q, kv, pattern, out, lse, scratch, target, config, num_splits)
    return Plan(launches, (out, lse))
