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

from hf_kvopt.kernels.checks import (
    COMPUTE_DTYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_head_dim,
    check_last_contiguous,
    check_pattern,
    check_scalars,
    check_shape,
    debug_enabled,
    mask_strides,
)
from hf_kvopt.kernels.launch import (
    LOG2E,
    Config,
    Launch,
    Target,
    cdiv,
    dot_dtype,
    fit_config,
    next_power_of_two,
    target_of,
)
from hf_kvopt.kernels.paged_prefill import visit_bounds
from hf_kvopt.kernels.reference import AttentionOut, attention_reference, visible_pairs
from hf_kvopt.kernels.shim import TensorDescriptor, tl, triton
from hf_kvopt.kernels.tile import add_sink, apply_mask, cap_scores, is_seen, log_sum, reciprocal, softmax_step

# Chosen by compiled registers and shared memory (evals/kernels.py); measured on no card yet. Warp specialisation is not
# used: Triton 3.9 compiles it to the same machine code on sm_90 and fails on sm_100.
# family: (head_dim up to 64, up to 128, above; the same with anything beyond causal; float32)
CONFIGS = {
    "interpret": (Config(16, 16, 4, 1),) * 7,
    "sm80": (
        Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2),
        Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2),
        Config(16, 16, 4, 1),
    ),
    "sm86": (
        Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2),
        Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2),
        Config(16, 16, 4, 1),
    ),
    "sm90": (
        Config(128, 128, 8, 3, tma=True), Config(128, 128, 8, 2, tma=True), Config(128, 64, 8, 2, tma=True),
        Config(128, 64, 8, 3, tma=True), Config(128, 64, 8, 2, tma=True), Config(64, 32, 4, 2, tma=True),
        Config(16, 16, 4, 1),
    ),
    "sm100": (
        Config(128, 128, 8, 3, tma=True), Config(128, 128, 8, 2, tma=True), Config(128, 64, 8, 2, tma=True),
        Config(128, 64, 8, 3, tma=True), Config(128, 64, 8, 2, tma=True), Config(64, 32, 4, 2, tma=True),
        Config(16, 16, 4, 1),
    ),
    "cdna3": (
        Config(128, 64, 8, 1), Config(128, 64, 8, 1), Config(64, 32, 8, 1),
        Config(128, 32, 8, 1), Config(128, 32, 8, 1), Config(64, 32, 8, 1),
        Config(16, 16, 4, 1),
    ),
}  # fmt: skip


def flash_prefill_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_q_len: int | None = None,
) -> AttentionOut:
    """Attend in float32 torch, packed sequences one by one; see `flash_prefill`."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        kv_lens = torch.full((q.shape[0],), k.shape[2], device=q.device)
        seen = visible_pairs(q.shape[2], kv_lens, k.shape[2], is_causal, window, starts)
        if mask is not None and mask.shape[-1] < k.shape[2]:
            k, v, seen = (x[:, :, : mask.shape[-1]] for x in (k, v, seen.transpose(2, 3)))
            seen = seen.transpose(2, 3)
        return attention_reference(q, k, v, seen, scale, softcap, sinks, mask)
    out = q.new_zeros((1, q.shape[2], q.shape[1], v.shape[3]))
    lse = q.new_full((1, q.shape[1], q.shape[2]), -torch.inf, dtype=torch.float32)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        rows, columns = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        one = flash_prefill_reference(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], scale=scale, is_causal=is_causal, window=window,
            softcap=softcap, sinks=sinks,
        )  # fmt: skip
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
        first_position,
        last_position,
        kv_start,
        row_kv_len,
        window,
        BLOCK_N,
        IS_CAUSAL,
        HAS_WINDOW,
        mask_ptr is not None,
    )

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


def choose_config(
    head_dim: int,  # the larger of k's and v's
    dtype: torch.dtype,
    q_len: int,
    is_plain: bool,  # causal or full attention, and nothing else
    has_mask: bool,
    target: Target,
) -> Config:
    """Return the configuration for a head size, dtype and pattern."""
    column = 6 if dtype == torch.float32 else (head_dim > 64) + (head_dim > 128) + 3 * (not is_plain)
    return fit_config(CONFIGS[target.family][column], q_len, has_mask)


def _descriptor(tensor: Tensor, block_n: int, block_d: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, block_n, block_d])


def _suits_descriptor(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte strides and address, no empty axis."""
    aligned = tensor.is_meta or tensor.data_ptr() % 16 == 0
    strides = all(s * tensor.element_size() % 16 == 0 and s > 0 for s in tensor.stride()[:3])
    return aligned and strides and tensor.numel() > 0


def plan_flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_q_len: int | None = None,
) -> Launch:
    """Write the launch down; see `flash_prefill`."""
    batch, num_heads, q_len, k_dim = q.shape
    num_kv_heads, v_dim = k.shape[1], v.shape[3]
    k_block, v_block = next_power_of_two(k_dim), next_power_of_two(v_dim)
    plain = starts is not None or cu_seqlens_q is not None
    descriptors = config.tma and not plain and _suits_descriptor(k) and _suits_descriptor(v)
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_desc": _descriptor(k, config.block_n, k_block) if descriptors else None,
        "v_desc": _descriptor(v, config.block_n, v_block) if descriptors else None,
        "cu_q_ptr": cu_seqlens_q,
        "cu_k_ptr": cu_seqlens_k,
        "starts_ptr": starts,
        "mask_ptr": mask,
        "sinks_ptr": sinks,
        "out_ptr": out,
        "lse_ptr": lse,
        "q_len": q_len,
        "kv_len": k.shape[2],
        "score_scale": scale * LOG2E if softcap is None else scale / softcap,
        "cap": 0.0 if softcap is None else softcap * LOG2E,
        "window": window or 0,
        "mask_len": 0 if mask is None else mask.shape[3],
        **dict(zip(("stride_q_b", "stride_q_h", "stride_q_m"), q.stride()[:3], strict=True)),
        **dict(zip(("stride_k_b", "stride_k_h", "stride_k_n"), k.stride()[:3], strict=True)),
        **dict(zip(("stride_v_b", "stride_v_h", "stride_v_n"), v.stride()[:3], strict=True)),
        **mask_strides(mask),
        "NUM_HEADS": num_heads,
        "GROUP": num_heads // num_kv_heads,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_BLOCK": k_block,
        "V_BLOCK": v_block,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IS_CAUSAL": is_causal,
        "HAS_WINDOW": window is not None,
        "HAS_CAP": softcap is not None,
        "MASK_MIN": 0.0 if mask is None or mask.dtype == torch.bool else torch.finfo(mask.dtype).min,
        "DTYPE": dot_dtype(q.dtype, target),
    }
    rows, longest = batch, q_len
    if cu_seqlens_q is not None:
        rows, longest = cu_seqlens_q.shape[0] - 1, max_q_len or q_len
    grid = (cdiv(longest, config.block_m), num_heads, rows)
    return Launch(_flash_prefill_kernel, grid, args, config.options)


def flash_prefill(
    q: Tensor,  # [batch, num_heads, q_len, head_dim], last axis contiguous
    k: Tensor,  # [batch, num_kv_heads, kv_len, head_dim], last axis contiguous
    v: Tensor,  # [batch, num_kv_heads, kv_len, v_dim], last axis contiguous
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [num_heads]
    starts: Tensor | None = None,  # [batch] int32
    mask: Tensor | None = None,  # [batch | 1, num_heads | 1, q_len | 1, kv_len] bool or float
    cu_seqlens_q: Tensor | None = None,  # [num_seqs + 1] int32: packed sequences, batch is 1
    cu_seqlens_k: Tensor | None = None,  # [num_seqs + 1] int32
    max_q_len: int | None = None,  # of the packed sequences; q_len if None
    config: Config | None = None,
) -> AttentionOut:
    """Attend over dense keys and values; queries beyond the last packed sequence are left as zeros."""
    target = target_of(q)
    _check(q, k, v, sinks, starts, mask, cu_seqlens_q, cu_seqlens_k)
    check_scalars(scale, window, softcap)
    batch, num_heads, q_len, k_dim = q.shape
    shape = (batch, q_len, num_heads, v.shape[3])
    if cu_seqlens_q is None:
        out, lse = q.new_empty(shape), q.new_empty((batch, num_heads, q_len), dtype=torch.float32)
    else:
        out = q.new_zeros(shape)
        lse = q.new_full((batch, num_heads, q_len), -torch.inf, dtype=torch.float32)
    if out.numel():
        extras = (window, softcap, sinks, starts, mask, cu_seqlens_q)
        is_plain = all(extra is None for extra in extras)
        if config is None:
            longest = max_q_len or q_len
            config = choose_config(max(k_dim, v.shape[3]), q.dtype, longest, is_plain, mask is not None, target)
        plan_flash_prefill(
            q, k, v, out, lse, target, config, scale=scale, is_causal=is_causal, window=window, softcap=softcap,
            sinks=sinks, starts=starts, mask=mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_q_len=max_q_len,
        ).run()  # fmt: skip
    return AttentionOut(out, lse)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, *COMPUTE_DTYPES)
    batch, num_heads, _, head_dim = q.shape
    check_shape("k", k, (batch, None, None, head_dim))
    check_shape("v", v, (*k.shape[:3], None))
    check_head_dim("head_dim", head_dim)
    check_head_dim("v's head_dim", v.shape[3])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(name, tensor)
        check_dtype(name, tensor, q.dtype)
        check_device(name, tensor, q)
    if num_heads % max(1, k.shape[1]):
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {k.shape[1]}: got {num_heads}")
    check_pattern(q, sinks, starts, mask)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together: got one of them")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_packed(q, k, starts, mask, cu_seqlens_q, cu_seqlens_k)


def _check_packed(
    q: Tensor, k: Tensor, starts: Tensor | None, mask: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> None:
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1: got {q.shape[0]}; concatenate them along q_len")
    if starts is not None or mask is not None:
        raise ValueError("packed sequences take neither starts nor mask: got one; drop the padding instead")
    for name, bounds, length in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[2]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[2]),
    ):
        check_shape(name, bounds, (cu_seqlens_q.shape[0],))
        check_dtype(name, bounds, torch.int32)
        check_contiguous(name, bounds)
        check_device(name, bounds, q)
        if debug_enabled():
            steps = bounds.diff()
            if int(bounds[0]) != 0 or int(bounds[-1]) > length or bool((steps < 0).any()):
                raise ValueError(f"{name} must rise from 0 to at most {length}: got {bounds.tolist()}")
