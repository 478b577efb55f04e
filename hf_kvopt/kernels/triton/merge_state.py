"""Merge attention over parts of the keys into attention over all of them.

    lse = log(sum_s exp(lse_s))        out = sum_s exp(lse_s - lse) out_s

A part that has seen nothing has lse -inf, and its output is never read. A sink joins the denominator here,
once. Equation 3 of "Flash-Decoding for long-context inference" (Dao et al., 2023); also what cascade
attention over a shared prefix needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kvopt.kernels.reference.attention import AttentionOut
from hf_kvopt.kernels.triton.checks import (
    COMPUTE_DTYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
)
from hf_kvopt.kernels.triton.launch import Launch, next_power_of_two, target_of
from hf_kvopt.kernels.triton.optional import tl, triton


def merge_state_reference(
    partial_out: Tensor,
    partial_lse: Tensor,
    sinks: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionOut:
    """Merge in float32 torch; see `merge_state`."""
    lse = torch.logsumexp(partial_lse, dim=0)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[None, :, None])
    pivot = lse.where(lse != -torch.inf, 0.0)
    weights = torch.exp(partial_lse - pivot).transpose(-1, -2).unsqueeze(-1)
    parts = partial_out.float().where(weights > 0, 0.0)
    return AttentionOut((weights * parts).sum(dim=0).to(dtype or partial_out.dtype), lse)


@triton.jit(do_not_specialize=["num_rows", "q_len", "num_heads", "num_splits", "stride_part_h", "stride_part_m"])
def _merge_state_kernel(
    part_out_ptr,  # [num_splits, batch, q_len, num_heads, v_dim]
    part_lse_ptr,  # [num_splits, batch, num_heads, q_len], the last two in any order, natural log
    sinks_ptr,
    out_ptr,  # [batch, q_len, num_heads, v_dim]
    lse_ptr,  # [batch, num_heads, q_len]
    num_rows,  # batch * q_len * num_heads
    q_len,
    num_heads,
    num_splits,
    stride_part_h,
    stride_part_m,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per row of the output."""
    row = tl.program_id(0).to(tl.int64)
    head = row % num_heads
    batch_q = row // num_heads
    batch, token = batch_q // q_len, batch_q % q_len
    lse_row = (batch * num_heads + head) * q_len + token
    part_row = batch * num_heads * q_len + head * stride_part_h + token * stride_part_m
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < V_DIM

    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    greatest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        mask_s = start + offs_s < num_splits
        part = tl.load(part_lse_ptr + (start + offs_s) * num_rows + part_row, mask=mask_s, other=float("-inf"))
        greatest = tl.maximum(greatest, part)
    m_i = tl.max(greatest, 0) * 1.4426950408889634
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        m_i = tl.maximum(m_i, sink)
    pivot = tl.where(m_i == float("-inf"), 0.0, m_i)

    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        mask_s = start + offs_s < num_splits
        part = tl.load(part_lse_ptr + (start + offs_s) * num_rows + part_row, mask=mask_s, other=float("-inf"))
        weight = tl.exp2(part * 1.4426950408889634 - pivot)
        # Splits that hold nothing have written their lse only. [BLOCK_S, BLOCK_D]
        wanted = (mask_s & (part != float("-inf")))[:, None] & mask_d[None, :]
        offs = ((start + offs_s) * num_rows + row)[:, None] * V_DIM + offs_d[None, :]
        values = tl.load(part_out_ptr + offs, mask=wanted, other=0.0).to(tl.float32)
        total += weight
        acc += tl.sum(weight[:, None] * values, 0)
    denominator = tl.sum(total, 0)
    if sinks_ptr is not None:
        denominator += tl.exp2(sink - pivot)
    out = acc * tl.where(denominator == 0.0, 0.0, 1.0 / denominator)
    tl.store(out_ptr + row * V_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    if lse_ptr is not None:
        lse = tl.where(denominator == 0.0, float("-inf"), (m_i + tl.log2(denominator)) * 0.6931471805599453)
        tl.store(lse_ptr + lse_row, lse)


def plan_merge_state(
    partial_out: Tensor,
    partial_lse: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> Launch:
    """Write the launch down; see `merge_state`."""
    num_splits, batch, q_len, num_heads, v_dim = partial_out.shape
    num_rows = batch * q_len * num_heads
    args = {
        "part_out_ptr": partial_out,
        "part_lse_ptr": partial_lse,
        "sinks_ptr": sinks,
        "out_ptr": out,
        "lse_ptr": lse,
        "num_rows": num_rows,
        "q_len": q_len,
        "num_heads": num_heads,
        "num_splits": num_splits,
        "stride_part_h": partial_lse.stride(2),
        "stride_part_m": partial_lse.stride(3),
        "V_DIM": v_dim,
        "BLOCK_D": next_power_of_two(v_dim),
        "BLOCK_S": 16,
    }
    return Launch(_merge_state_kernel, (num_rows, 1, 1), args, {"num_warps": 4}, ("part_out_ptr", "part_lse_ptr"))


def merge_state(
    partial_out: Tensor,  # [num_splits, batch, q_len, num_heads, v_dim], contiguous
    partial_lse: Tensor,  # [num_splits, batch, num_heads, q_len] float32, contiguous, without sinks
    sinks: Tensor | None = None,  # [num_heads]
    dtype: torch.dtype | None = None,  # of the output; that of the parts if None
) -> AttentionOut:
    """Return the merged output and its lse (sinks included)."""
    check_shape("partial_out", partial_out, (None, None, None, None, None))
    num_splits, batch, q_len, num_heads, v_dim = partial_out.shape
    check_dtype("partial_out", partial_out, *COMPUTE_DTYPES)
    check_contiguous("partial_out", partial_out)
    check_shape("partial_lse", partial_lse, (num_splits, batch, num_heads, q_len))
    check_dtype("partial_lse", partial_lse, torch.float32)
    check_contiguous("partial_lse", partial_lse)
    check_device("partial_lse", partial_lse, partial_out)
    if sinks is not None:
        check_shape("sinks", sinks, (num_heads,))
        check_last_contiguous("sinks", sinks)
        check_device("sinks", sinks, partial_out)
    target_of(partial_out)
    out = partial_out.new_empty((batch, q_len, num_heads, v_dim), dtype=dtype or partial_out.dtype)
    lse = partial_lse.new_empty((batch, num_heads, q_len))
    if out.numel():
        plan_merge_state(partial_out, partial_lse, sinks, out, lse).run()
    return AttentionOut(out, lse)
