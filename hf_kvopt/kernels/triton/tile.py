"""Pieces of a kernel that the attention ops share: scores, visibility, one softmax step.

Scores are kept in base 2: s = q k^T * scale * log2(e), so that exp is one `exp2`. The running state of a row
is (m_i, l_i, acc): greatest score so far, sum of 2^(s - m_i), and the same sum weighted by v.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton


@triton.jit
def tanh(x):
    """tanh that neither overflows nor needs libdevice; absolute error below 1e-6."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)


@triton.jit
def cap_scores(dots, score_scale, cap, HAS_CAP: tl.constexpr):
    """Scale products into base-2 scores; with a cap, score_scale is scale / softcap and cap is softcap * log2(e)."""
    scores = dots * score_scale
    if HAS_CAP:
        scores = cap * tanh(scores)
    return scores


@triton.jit
def is_seen(
    position,  # [BLOCK_M] of each query
    offs_n,  # [BLOCK_N] kv indices
    kv_lo,
    kv_len,
    window,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Return [BLOCK_M or 1, BLOCK_N]: which query sees which kv index, explicit masks aside."""
    seen = ((offs_n >= kv_lo) & (offs_n < kv_len))[None, :]
    if IS_CAUSAL:
        seen = seen & (offs_n[None, :] <= position[:, None])
    if HAS_WINDOW:
        seen = seen & (offs_n[None, :] > position[:, None] - window)
    return seen


@triton.jit
def apply_mask(
    scores,  # [BLOCK_M, BLOCK_N]
    seen,
    mask_ptrs,  # [BLOCK_M, BLOCK_N] addresses of the explicit mask
    loadable,  # [BLOCK_M, BLOCK_N] which of them exist
    MASK_MIN: tl.constexpr,  # the float at or below which a pair is not seen; 0.0 marks a bool mask
):
    """Apply an explicit mask and return (scores, seen)."""
    if MASK_MIN == 0.0:
        allowed = tl.load(mask_ptrs, mask=loadable, other=0)
        seen = seen & (allowed != 0)
    else:
        bias = tl.load(mask_ptrs, mask=loadable, other=float("-inf")).to(tl.float32)
        seen = seen & (bias > MASK_MIN)
        scores = scores + bias * 1.4426950408889634
    return scores, seen


@triton.jit
def softmax_step(scores, m_i, l_i):
    """Fold one tile of scores into the running softmax; returns (p, alpha, m_i, l_i).

    A denominator [BLOCK_M, BLOCK_N] is summed along its columns by the caller, after the last tile.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    # Finite for rows that have seen nothing yet, or exp2(-inf - -inf) would be NaN.
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - pivot[:, None])
    alpha = tl.exp2(m_i - pivot)
    if len(l_i.shape) == 2:
        return p, alpha, m_new, l_i * alpha[:, None] + p
    else:
        return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def add_sink(sinks_ptr, head, mask, m_i, l_i):
    """Let each row's sink logit join its denominator; returns (alpha, m_i, l_i)."""
    sink = tl.load(sinks_ptr + head, mask=mask, other=float("-inf")).to(tl.float32) * 1.4426950408889634
    m_new = tl.maximum(m_i, sink)
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - pivot)
    return alpha, m_new, l_i * alpha + tl.exp2(sink - pivot)


@triton.jit
def log_sum(m_i, l_i):
    """Return the natural log of the denominator; -inf for a row that has seen nothing."""
    return tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_i)) * 0.6931471805599453)


@triton.jit
def reciprocal(l_i):
    """Return 1 / l_i, and 0 for a row that has seen nothing."""
    return tl.where(l_i == 0.0, 0.0, 1.0 / l_i)


@triton.jit
def store_plane(
    out_row_ptrs,  # [BLOCK_M, 1]
    mask_m,  # [BLOCK_M, 1]
    out,  # [BLOCK_M, BLOCK]
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    DIM: tl.constexpr,
):
    """Write a plane's channels of the output."""
    offs = tl.arange(0, out.shape[1])[None, :]
    out_ptrs = out_row_ptrs + (PLANES * offs + PLANE)
    tl.store(out_ptrs, out.to(out_row_ptrs.dtype.element_ty), mask=mask_m & (offs < DIM // PLANES))


@triton.jit
def store_output(
    out_row_ptrs,  # [BLOCK_M, 1]
    mask_m,  # [BLOCK_M, 1]
    factor,  # [BLOCK_M, 1]
    acc0,
    acc1,
    acc2,
    acc3,
    V_DIM: tl.constexpr,
    V_PLANES: tl.constexpr,
):
    """Write the accumulators times a factor."""
    store_plane(out_row_ptrs, mask_m, acc0 * factor, 0, V_PLANES, V_DIM)
    if V_PLANES > 1:
        store_plane(out_row_ptrs, mask_m, acc1 * factor, 1, V_PLANES, V_DIM)
    if V_PLANES > 2:
        store_plane(out_row_ptrs, mask_m, acc2 * factor, 2, V_PLANES, V_DIM)
        store_plane(out_row_ptrs, mask_m, acc3 * factor, 3, V_PLANES, V_DIM)
