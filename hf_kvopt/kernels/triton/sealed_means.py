"""Products of queries with the mean keys of sealed blocks, by which scores of a block's tokens are shifted alike.

A program that reads part of a row makes those of all its blocks first, 16 at a time, and keeps them in memory that is
near; one that reads all of a long row makes them block by block.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.codes import KEY_UNIT
from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.sealed_codes import plane_channels, plane_width

_KEY_UNIT = tl.constexpr(KEY_UNIT)


@triton.jit
def _means_part(
    dots,  # [BLOCK_M, 16]
    q,
    mean_ptrs,  # [16, 1] addresses of a head's means
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Return `dots` with the products of a plane of queries, in the unit of products with codes."""
    BLOCK_W: tl.constexpr = q.shape[1]
    is_there = tl.arange(0, BLOCK_W) < plane_width(BITS, DIM)
    channels = plane_channels(PLANE, BITS, DIM, BLOCK_W)
    mean = tl.load(mean_ptrs + channels[None, :], mask=is_there[None, :], other=0.0).to(q.dtype)
    part = tl.dot(q, tl.trans(mean), input_precision="ieee")
    if BIASED:
        return dots + part * ((16.0 if BITS == 4 and PLANE % 2 == 1 else 1.0) / _KEY_UNIT)
    else:
        return dots + part


@triton.jit
def _means(q0, q1, q2, q3, mean_ptrs, BITS: tl.constexpr, DIM: tl.constexpr, BIASED: tl.constexpr):
    """Return [BLOCK_M, 16]: products of queries with the means of 16 blocks' keys."""
    dots = tl.zeros([q0.shape[0], 16], tl.float32)
    dots = _means_part(dots, q0, mean_ptrs, 0, BITS, DIM, BIASED)
    dots = _means_part(dots, q1, mean_ptrs, 1, BITS, DIM, BIASED)
    if BITS != 8:
        dots = _means_part(dots, q2, mean_ptrs, 2, BITS, DIM, BIASED)
        dots = _means_part(dots, q3, mean_ptrs, 3, BITS, DIM, BIASED)
    return dots


@triton.jit
def mean_dots(q0, q1, q2, q3, mean_ptr, BITS: tl.constexpr, DIM: tl.constexpr, BIASED: tl.constexpr):
    """Return [BLOCK_M]: products of queries with the mean of one block's keys."""
    # A product takes 16 columns at least.
    mean_ptrs = mean_ptr + tl.zeros([16, 1], tl.int32)
    return tl.max(_means(q0, q1, q2, q3, mean_ptrs, BITS, DIM, BIASED), 1)


@triton.jit
def store_mean_dots(
    means_row_ptrs,  # [BLOCK_M] address of each row's products, one for each block of its table
    q0,
    q1,
    q2,
    q3,
    mask_m,  # [BLOCK_M, 1]
    mean_ptr,
    table_ptr,
    first_block,
    stop_block,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Write the products of queries with the means of the blocks [first_block, stop_block), 16 at a time."""
    for first in tl.range(first_block, stop_block, 16, num_stages=1):
        offs = first + tl.arange(0, 16)
        blocks = tl.load(table_ptr + offs, mask=offs < stop_block, other=0).to(tl.int64)
        mean_ptrs = (mean_ptr + (blocks * NUM_KV_HEADS + kv_head) * DIM)[:, None]
        dots = _means(q0, q1, q2, q3, mean_ptrs, BITS, DIM, BIASED)
        tl.store(means_row_ptrs[:, None] + offs[None, :], dots, mask=mask_m & (offs < stop_block)[None, :])
    tl.debug_barrier()  # other threads of the program read them
