"""Attention of a chunk of queries over a block table: chunked prefill, prompts after a shared prefix, drafts.

    out = softmax(softcap(q k^T * scale) + mask) v      k, v read through the table, never gathered

A program takes BLOCK_M rows of one KV head, a row being one query token and one of the head's query heads
(row r: token r // GROUP), so that a few draft tokens of many heads fill a tile. Tiles of keys that no row of
the program may see are not visited, and only tiles on an edge (first valid index, window, diagonal, length)
are masked. An explicit mask, such as that of a draft tree, is read tile by tile.

FlashAttention-2: Dao, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.checks import check_paged, check_scalars, mask_strides
from hf_kvopt.kernels.launch import (
    LOG2E,
    Config,
    Launch,
    Target,
    cdiv,
    column_of,
    dot_dtype,
    fit_config,
    next_power_of_two,
    target_of,
)
from hf_kvopt.kernels.paged_tile import attend_tile, load_query, store_output
from hf_kvopt.kernels.reference import AttentionOut, paged_reference
from hf_kvopt.kernels.shim import tl, triton
from hf_kvopt.kernels.tile import add_sink, log_sum, reciprocal
from hf_kvopt.quant import Format

paged_prefill_reference = paged_reference

# Chosen by compiled registers and shared memory (evals/kernels.py); measured on no card yet.
# family: (head_dim up to 128, above; the same with quantized storage; float32)
CONFIGS = {
    "interpret": (Config(16, 16, 4, 1),) * 5,
    "sm80": (
        Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 16, 8, 2), Config(64, 16, 8, 2), Config(16, 16, 4, 1),
    ),
    "sm86": (
        Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 16, 8, 2), Config(64, 16, 8, 2), Config(16, 16, 4, 1),
    ),
    "sm90": (
        Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 16, 8, 2), Config(16, 16, 4, 1),
    ),
    "sm100": (
        Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 16, 8, 2), Config(16, 16, 4, 1),
    ),
    "cdna3": (
        Config(128, 32, 8, 1), Config(64, 32, 4, 1), Config(64, 32, 4, 1), Config(64, 32, 8, 1), Config(16, 16, 4, 1),
    ),
}  # fmt: skip


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
    K_PACK: tl.constexpr,
    V_PACK: tl.constexpr,
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
    q_even, q_odd = load_query(q_row_ptrs, mask_m[:, None], K_DIM, K_BLOCK, K_PACK == 2, Q_DTYPE)
    mask_row_ptrs = None
    if mask_ptr is not None:
        mask_row_ptrs = (mask_ptr + batch * stride_mask_b + head * stride_mask_h + token * stride_mask_m)[:, None]
    table_ptr = block_table_ptr + batch * stride_table_b
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_even = tl.zeros([BLOCK_M, V_BLOCK // V_PACK], tl.float32)
    acc_odd = acc_even
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
                acc_even, acc_odd, m_i, l_i = attend_tile(
                    q_even,
                    q_odd,
                    acc_even,
                    acc_odd,
                    m_i,
                    l_i,
                    position,
                    tile_start,
                    kv_lo,
                    kv_hi,
                    table_ptr,
                    k_ptr,
                    v_ptr,
                    k_scale_ptr,
                    v_scale_ptr,
                    mask_row_ptrs,
                    mask_m[:, None],
                    mask_len,
                    stride_mask_n,
                    kv_head,
                    score_scale,
                    cap,
                    window,
                    NUM_KV_HEADS,
                    K_DIM // K_PACK,
                    V_DIM // V_PACK,
                    K_BLOCK // K_PACK,
                    V_BLOCK // V_PACK,
                    BLOCK_SIZE,
                    BLOCK_N,
                    IS_CAUSAL,
                    HAS_WINDOW,
                    HAS_CAP,
                    MASK_MIN,
                    run != 1,
                    P_DTYPE,
                )
    if sinks_ptr is not None:
        alpha, m_i, l_i = add_sink(sinks_ptr, head, mask_m, m_i, l_i)
        acc_even *= alpha[:, None]
        acc_odd *= alpha[:, None]
    inverse = reciprocal(l_i)[:, None]
    num_heads = NUM_KV_HEADS * GROUP
    out_row_ptrs = (out_ptr + ((batch * q_len + token) * num_heads + head) * V_DIM)[:, None]
    store_output(out_row_ptrs, mask_m[:, None], acc_even * inverse, acc_odd * inverse, V_DIM, V_BLOCK, V_PACK == 2)
    tl.store(lse_ptr + (batch * num_heads + head) * q_len + token, log_sum(m_i, l_i), mask=mask_m)


def choose_config(
    head_dim: int,  # the larger of k's and v's
    dtype: torch.dtype,  # of q
    formats: tuple[Format, Format],
    num_rows: int,  # query heads of a group x q_len
    has_mask: bool,
    target: Target,
) -> Config:
    """Return the configuration of one KV head's work."""
    return fit_config(CONFIGS[target.family][column_of(head_dim, dtype, formats)], num_rows, has_mask)


def plan_paged_prefill(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    formats: tuple[Format, Format],
    target: Target,
    config: Config,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Launch:
    """Write the launch down; see `paged_prefill`."""
    batch, num_heads, q_len, k_dim = q.shape
    _, block_size, num_kv_heads, v_width = v_pool.shape
    group = num_heads // num_kv_heads
    v_dim = v_width * formats[1].codes_per_byte
    # Scales of values can be smaller than float16 resolves: probabilities that carry them go to bfloat16.
    p_dtype = torch.bfloat16 if q.dtype == torch.float16 and formats[1].has_scale else q.dtype
    args = {
        "q_ptr": q,
        "k_ptr": k_pool,
        "v_ptr": v_pool,
        "k_scale_ptr": k_scale,
        "v_scale_ptr": v_scale,
        "block_table_ptr": block_table,
        "seq_lens_ptr": seq_lens,
        "starts_ptr": starts,
        "mask_ptr": mask,
        "sinks_ptr": sinks,
        "out_ptr": out,
        "lse_ptr": lse,
        "q_len": q_len,
        "score_scale": scale * LOG2E if softcap is None else scale / softcap,
        "cap": 0.0 if softcap is None else softcap * LOG2E,
        "window": window or 0,
        "mask_len": 0 if mask is None else mask.shape[3],
        **dict(zip(("stride_q_b", "stride_q_h", "stride_q_m"), q.stride()[:3], strict=True)),
        "stride_table_b": block_table.stride(0),
        **mask_strides(mask),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_BLOCK": next_power_of_two(k_dim),
        "V_BLOCK": next_power_of_two(v_dim),
        "K_PACK": formats[0].codes_per_byte,
        "V_PACK": formats[1].codes_per_byte,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IS_CAUSAL": is_causal,
        "HAS_WINDOW": window is not None,
        "HAS_CAP": softcap is not None,
        "MASK_MIN": 0.0 if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min,
        "Q_DTYPE": dot_dtype(q.dtype, target),
        "P_DTYPE": dot_dtype(p_dtype, target),
    }
    grid = (cdiv(q_len * group, config.block_m), num_kv_heads, batch)
    return Launch(_paged_prefill_kernel, grid, args, config.options)


def paged_prefill(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    k_pool: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim or packed]
    v_pool: Tensor,  # [num_blocks, block_size, num_kv_heads, v_dim or packed]
    block_table: Tensor,  # [batch, max_blocks] int32
    seq_lens: Tensor,  # [batch] int32, new tokens included
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [num_heads]
    starts: Tensor | None = None,  # [batch] int32
    mask: Tensor | None = None,  # [batch | 1, num_heads | 1, q_len | 1, kv_len] bool or float
    k_scale: Tensor | None = None,  # [num_blocks, block_size, num_kv_heads]
    v_scale: Tensor | None = None,
    config: Config | None = None,
) -> AttentionOut:
    """Attend to each row's tokens through its table; see the module."""
    target = target_of(q)
    formats = check_paged(q, k_pool, v_pool, block_table, seq_lens, k_scale, v_scale, sinks, starts, mask, target)
    check_scalars(scale, window, softcap)
    batch, num_heads, q_len, k_dim = q.shape
    v_dim = v_pool.shape[3] * formats[1].codes_per_byte
    out = q.new_empty((batch, q_len, num_heads, v_dim))
    lse = q.new_empty((batch, num_heads, q_len), dtype=torch.float32)
    if not out.numel():
        return AttentionOut(out, lse)
    launch = plan_paged_prefill(
        q,
        k_pool,
        v_pool,
        block_table,
        seq_lens,
        out,
        lse,
        formats,
        target,
        config
        or choose_config(
            max(k_dim, v_dim), q.dtype, formats, q_len * num_heads // k_pool.shape[2], mask is not None, target
        ),
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        starts=starts,
        mask=mask,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    launch.run()
    return AttentionOut(out, lse)
