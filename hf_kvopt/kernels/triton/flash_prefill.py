"""Attention over dense q, k, v: the first prefill, packed sequences, and models without a cache.

    out = softmax(softcap(q k^T * scale) + mask) v      by tiles, with a running softmax: no [q_len, kv_len] tensor

A program takes BLOCK_M queries of one head. Tiles of keys that none of them may see are not visited; only tiles on
an edge (first valid index, window, diagonal, length) are masked. Where the card has a tensor memory accelerator,
keys and values arrive through tensor descriptors; left padding and packed sequences take the pointer path, whose
loads can be masked to a row's own tokens.
FlashAttention-2: Dao, 2023. FlashAttention-3: Shah et al., 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.paged_kv import empty_results
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import AttentionOut, attention_reference, visible_pairs
from hf_kvopt.kernels.triton.arguments import pattern_args, strides_of
from hf_kvopt.kernels.triton.checks import check_dense
from hf_kvopt.kernels.triton.configs import flash_prefill_config
from hf_kvopt.kernels.triton.launch import Config, Launch, Target, cdiv, dot_dtype, next_power_of_two, target_of
from hf_kvopt.kernels.triton.optional import TensorDescriptor, tl, triton
from hf_kvopt.kernels.triton.paged_prefill import visit_bounds
from hf_kvopt.kernels.triton.tile import add_sink, apply_mask, cap_scores, is_seen, log_sum, reciprocal, softmax_step


def flash_prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: Packed | None = None
) -> AttentionOut:
    """Attend in float32 torch, packed sequences one by one; see `flash_prefill`."""
    scale, is_causal, window, softcap, sinks, starts, mask = pattern
    if packed is None:
        kv_lens = torch.full((q.shape[0],), k.shape[2], device=q.device)
        seen = visible_pairs(q.shape[2], kv_lens, k.shape[2], is_causal, window, starts)
        if mask is not None and mask.shape[-1] < k.shape[2]:
            k, v, seen = (x[:, :, : mask.shape[-1]] for x in (k, v, seen.transpose(2, 3)))
            seen = seen.transpose(2, 3)
        return attention_reference(q, k, v, seen, scale, softcap, sinks, mask)
    out = q.new_zeros((1, q.shape[2], q.shape[1], v.shape[3]))
    lse = q.new_full((1, q.shape[1], q.shape[2]), -torch.inf, dtype=torch.float32)
    bounds_q, bounds_k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        rows, columns = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        one = flash_prefill_reference(q[:, :, rows], k[:, :, columns], v[:, :, columns], pattern)
        out[:, rows] = one.out
        if one.lse is not None:
            lse[:, :, rows] = one.lse
    return AttentionOut(out, lse)


@triton.jit
def _load_tile(
    head_ptr,  # address of the head's first token
    desc,  # descriptor of [batch, num_kv_heads, kv_len, dim], or None
    batch,
    kv_head,
    tile_start,
    kv_lo,
    kv_hi,
    stride_n,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Return [BLOCK_N, BLOCK_D]; the pointer path never reads outside of [kv_lo, kv_hi)."""
    if desc is not None:
        return desc.load([batch, kv_head, tile_start, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        offs_n = tile_start + tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        ptrs = head_ptr + offs_n[:, None].to(tl.int64) * stride_n + offs_d
        if PARTIAL:
            inside = (offs_n >= kv_lo) & (offs_n < kv_hi)
            return tl.load(ptrs, mask=inside[:, None] & (offs_d < DIM), other=0.0)
        elif DIM == BLOCK_D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=offs_d < DIM, other=0.0)


@triton.jit(do_not_specialize=["q_len", "kv_len", "mask_len"])
def _flash_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    cu_q_ptr,
    cu_k_ptr,
    starts_ptr,
    mask_ptr,
    sinks_ptr,
    out_ptr,  # [batch, q_len, num_heads, v_dim]
    lse_ptr,  # [batch, num_heads, q_len]
    q_len,
    kv_len,
    score_scale,
    cap,
    window,
    mask_len,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASK_MIN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program per tile of queries, head and row (or packed sequence)."""
    # Last tiles first: under a causal mask they have the most to do.
    pid_m = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    batch = tl.program_id(2)
    # Where this row's queries and keys begin: packed sequences lie in one row of the tensors.
    tensor_row = batch.to(tl.int64)
    first_q = 0
    first_k = 0
    row_q_len = q_len
    row_kv_len = kv_len
    if cu_q_ptr is not None:
        tensor_row = tensor_row * 0
        first_q = tl.load(cu_q_ptr + batch)
        first_k = tl.load(cu_k_ptr + batch)
        row_q_len = tl.load(cu_q_ptr + batch + 1) - first_q
        row_kv_len = tl.load(cu_k_ptr + batch + 1) - first_k
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_q_len
    token = (first_q + offs_m).to(tl.int64)  # [BLOCK_M]

    kv_start = 0
    if starts_ptr is not None:
        kv_start = tl.load(starts_ptr + batch)
    first_position = row_kv_len - row_q_len + pid_m * BLOCK_M
    last_position = tl.minimum(first_position + BLOCK_M - 1, row_kv_len - 1)
    kv_lo, whole_lo, whole_hi, kv_hi = visit_bounds(
        first_position, last_position, kv_start, row_kv_len, window,
        BLOCK_N, IS_CAUSAL, HAS_WINDOW, mask_ptr is not None,
    )  # fmt: skip

    position = row_kv_len - row_q_len + offs_m
    offs_d = tl.arange(0, K_BLOCK)[None, :]
    q_ptrs = q_ptr + tensor_row * stride_q_b + head.to(tl.int64) * stride_q_h + token[:, None] * stride_q_m + offs_d
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < K_DIM), other=0.0).to(DTYPE)
    k_head_ptr = k_ptr + tensor_row * stride_k_b + kv_head.to(tl.int64) * stride_k_h + first_k * stride_k_n
    v_head_ptr = v_ptr + tensor_row * stride_v_b + kv_head.to(tl.int64) * stride_v_h + first_k * stride_v_n
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_BLOCK], tl.float32)
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
                k = _load_tile(
                    k_head_ptr, k_desc, batch, kv_head, tile_start, kv_lo, kv_hi, stride_k_n,
                    K_DIM, K_BLOCK, BLOCK_N, run != 1,
                )  # fmt: skip
                dots = tl.dot(q, tl.trans(k.to(DTYPE)), input_precision="ieee")
                scores = cap_scores(dots, score_scale, cap, HAS_CAP)
                if run != 1:
                    offs_n = tile_start + tl.arange(0, BLOCK_N)
                    seen = is_seen(position, offs_n, kv_lo, kv_hi, window, IS_CAUSAL, HAS_WINDOW)
                    if mask_ptr is not None:
                        mask_ptrs = mask_ptr + tensor_row * stride_mask_b + head.to(tl.int64) * stride_mask_h
                        mask_ptrs += token[:, None] * stride_mask_m + offs_n[None, :].to(tl.int64) * stride_mask_n
                        reachable = mask_m[:, None] & ((offs_n < mask_len) & (offs_n < kv_hi))[None, :]
                        scores, seen = apply_mask(scores, seen, mask_ptrs, reachable, MASK_MIN)
                    scores = tl.where(seen, scores, float("-inf"))
                p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i)
                v = _load_tile(
                    v_head_ptr, v_desc, batch, kv_head, tile_start, kv_lo, kv_hi, stride_v_n,
                    V_DIM, V_BLOCK, BLOCK_N, run != 1,
                )  # fmt: skip
                acc = tl.dot(p.to(DTYPE), v.to(DTYPE), acc * alpha[:, None], input_precision="ieee")
    if sinks_ptr is not None:
        alpha, m_i, l_i = add_sink(sinks_ptr, head + offs_m * 0, mask_m, m_i, l_i)
        acc *= alpha[:, None]
    acc *= reciprocal(l_i)[:, None]
    offs_v = tl.arange(0, V_BLOCK)[None, :]
    row = tensor_row * q_len + token
    out_ptrs = out_ptr + (row * NUM_HEADS + head)[:, None] * V_DIM + offs_v
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_v < V_DIM))
    lse_ptrs = lse_ptr + (tensor_row * NUM_HEADS + head) * q_len + token
    tl.store(lse_ptrs, log_sum(m_i, l_i), mask=mask_m)


def _descriptor(tensor: Tensor, block_n: int, block_d: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, block_n, block_d])


def _suits_descriptor(tensor: Tensor) -> bool:
    """Return whether the tensor memory accelerator can read it: 16-byte strides and address, no empty axis."""
    aligned = tensor.is_meta or tensor.data_ptr() % 16 == 0
    strides = all(s * tensor.element_size() % 16 == 0 and s > 0 for s in tensor.stride()[:3])
    return aligned and strides and tensor.numel() > 0


def plan_flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    packed: Packed | None,
    out: Tensor,
    lse: Tensor,
    target: Target,
    config: Config,
) -> Launch:
    """Write the launch down; see `flash_prefill`."""
    batch, num_heads, q_len, k_dim = q.shape
    num_kv_heads, v_dim = k.shape[1], v.shape[3]
    k_block, v_block = next_power_of_two(k_dim), next_power_of_two(v_dim)
    is_dense = pattern.starts is None and packed is None
    descriptors = config.tma and is_dense and _suits_descriptor(k) and _suits_descriptor(v)
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_desc": _descriptor(k, config.block_n, k_block) if descriptors else None,
        "v_desc": _descriptor(v, config.block_n, v_block) if descriptors else None,
        "cu_q_ptr": packed.cu_seqlens_q if packed else None,
        "cu_k_ptr": packed.cu_seqlens_k if packed else None,
        **pattern_args(pattern),
        "out_ptr": out,
        "lse_ptr": lse,
        "q_len": q_len,
        "kv_len": k.shape[2],
        **strides_of("q", q, "bhm"),
        **strides_of("k", k, "bhn"),
        **strides_of("v", v, "bhn"),
        "NUM_HEADS": num_heads,
        "GROUP": num_heads // num_kv_heads,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_BLOCK": k_block,
        "V_BLOCK": v_block,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DTYPE": dot_dtype(q.dtype, target),
    }
    rows, longest = (batch, q_len) if packed is None else (packed.num_seqs, packed.max_q_len or q_len)
    return Launch(_flash_prefill_kernel, (cdiv(longest, config.block_m), num_heads, rows), args, config.options)


def flash_prefill(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    k: Tensor,  # [batch, num_kv_heads, kv_len, head_dim], last axis contiguous
    v: Tensor,  # [batch, num_kv_heads, kv_len, v_dim], last axis contiguous
    pattern: Pattern,
    packed: Packed | None = None,  # several sequences in one row; batch is 1
    *,
    config: Config | None = None,
) -> AttentionOut:
    """Attend over dense keys and values; queries beyond the last packed sequence are left as zeros."""
    target = target_of(q)
    check_dense(q, k, v, pattern, packed)
    out, lse = empty_results(q, v.shape[3])
    if packed is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    if out.numel():
        longest = q.shape[2] if packed is None else packed.max_q_len or q.shape[2]
        is_plain = pattern.is_plain and packed is None
        widest = max(q.shape[3], v.shape[3])
        config = config or flash_prefill_config(widest, q.dtype, longest, is_plain, pattern.has_mask, target)
        plan_flash_prefill(q, k, v, pattern, packed, out, lse, target, config).run()
    return AttentionOut(out, lse)
