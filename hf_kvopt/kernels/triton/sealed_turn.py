"""Queries and sums in the domain of the rotation H in which blocks are sealed.

    q . k = (q H) . (k H)         sum_t p_t v_t = (sum_t p_t v_t H) H          H is symmetric and its own inverse

Times a power of sqrt(2), H has entries -1, 0 and 1 (0 between the blocks of a head size that is no power of two), and
is read as bytes; a codec that does not rotate has the identity. Planes are those of `sealed_codes`: the columns of H
are picked in their order, which brings channels into it at no cost.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.codes import KEY_UNIT
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.sealed_codes import plane_channels, plane_width

_KEY_UNIT = tl.constexpr(KEY_UNIT)


@triton.jit
def _matrix(
    h_ptr,  # [DIM, DIM] int8
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return a plane's columns of the rotation, [BLOCK, BLOCK_W], 0 where there are none."""
    offs_d = tl.arange(0, BLOCK)[:, None]
    is_there = (offs_d < DIM) & (tl.arange(0, BLOCK_W) < plane_width(BITS, DIM))[None, :]
    channels = plane_channels(PLANE, BITS, DIM, BLOCK_W)[None, :]
    return tl.load(h_ptr + offs_d * DIM + channels, mask=is_there, other=0).to(DTYPE)


@triton.jit
def turned_query(
    q_row_ptrs,  # [BLOCK_M, 1] address of each row's first channel
    mask_m,  # [BLOCK_M, 1]
    h_ptr,
    h_scale,
    score_scale,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    IN_DTYPE: tl.constexpr,  # as queries come
    DTYPE: tl.constexpr,  # as they are multiplied with codes
):
    """Return rotated queries (plane 0, 1, 2, 3), the sum of each row's channels, and what scales its products."""
    PLANES: tl.constexpr = 2 if BITS == 8 else 4
    BLOCK_W: tl.constexpr = BLOCK // PLANES
    offs = tl.arange(0, BLOCK)[None, :]
    q = tl.load(q_row_ptrs + offs, mask=mask_m & (offs < DIM), other=0.0).to(IN_DTYPE)
    q0 = tl.dot(q, _matrix(h_ptr, 0, BITS, DIM, BLOCK, BLOCK_W, IN_DTYPE), input_precision="ieee") * h_scale
    q1 = tl.dot(q, _matrix(h_ptr, 1, BITS, DIM, BLOCK, BLOCK_W, IN_DTYPE), input_precision="ieee") * h_scale
    greatest = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
    q2, q3 = q0, q1
    if PLANES == 4:
        q2 = tl.dot(q, _matrix(h_ptr, 2, BITS, DIM, BLOCK, BLOCK_W, IN_DTYPE), input_precision="ieee") * h_scale
        q3 = tl.dot(q, _matrix(h_ptr, 3, BITS, DIM, BLOCK, BLOCK_W, IN_DTYPE), input_precision="ieee") * h_scale
        greatest = tl.maximum(greatest, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
    row_scale = score_scale
    if tl.float32 != DTYPE:
        # Each row times a power of two that puts its greatest channel between 256 and 512, as in `load_query`.
        exponent = greatest.to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.minimum(tl.maximum(exponent, 27 << 23), 227 << 23)
        row_scale = exponent.to(tl.float32, bitcast=True)[:, None] * (score_scale / 256.0)
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None] * 256.0
        q0, q1, q2, q3 = q0 * inverse, q1 * inverse, q2 * inverse, q3 * inverse
    # Summed up as they are multiplied: a sum of what was rounded away would not cancel.
    q0, q1, q2, q3 = q0.to(DTYPE), q1.to(DTYPE), q2.to(DTYPE), q3.to(DTYPE)
    total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    if PLANES == 4:
        total += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
    if BIASED:
        total, row_scale = total * (1.0 / _KEY_UNIT), row_scale * _KEY_UNIT
        if BITS == 4:
            q1, q3 = (q1 * 0.0625).to(DTYPE), (q3 * 0.0625).to(DTYPE)
    return q0, q1, q2, q3, total[:, None], row_scale


@triton.jit
def _turned_plane(acc, sums, h_ptr, PLANE: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr):
    h = tl.trans(_matrix(h_ptr, PLANE, BITS, DIM, acc.shape[1], sums.shape[1], DTYPE))
    if tl.float32 == DTYPE:
        return tl.dot(sums, h, acc, input_precision="ieee")
    else:
        # Twice the bits of DTYPE: what it leaves out is turned, too.
        first = sums.to(DTYPE)
        acc = tl.dot(first, h, acc)
        return tl.dot((sums - first.to(tl.float32)).to(DTYPE), h, acc)


@triton.jit
def turned(
    acc0,
    acc1,
    acc2,
    acc3,  # [BLOCK_M, BLOCK_W] planes of sums over sealed values
    h_ptr,
    h_scale,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the sums in the order and the domain of exact values, [BLOCK_M, BLOCK]."""
    acc = tl.zeros([acc0.shape[0], BLOCK], tl.float32)
    acc = _turned_plane(acc, acc0, h_ptr, 0, BITS, DIM, DTYPE)
    acc = _turned_plane(acc, acc1, h_ptr, 1, BITS, DIM, DTYPE)
    if BITS != 8:
        acc = _turned_plane(acc, acc2, h_ptr, 2, BITS, DIM, DTYPE)
        acc = _turned_plane(acc, acc3, h_ptr, 3, BITS, DIM, DTYPE)
    return acc * h_scale
