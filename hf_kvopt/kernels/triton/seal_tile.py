"""One head of one block on its way into sealed storage: turned, centred, quantized in the nearest direction, packed.

Tokens are taken a few at a time, and what was made of them waits in scratch memory for the next step.

It does what `quant.sealed.seal` does, with sums in float64, of which float32 keeps nothing of their order: a block
gives the same bytes on every device.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton
from hf_kvopt.kernels.triton.store_tile import _round_even as round_even


@triton.jit
def _try(y, reach, share, MIDDLE: tl.constexpr, DIM: tl.constexpr):
    """Return (codes, y along them, nearness) of y [BLOCK_T, groups, GROUP] whose codes span `share` of the range."""
    codes = tl.clamp(tl.div_rn(y, tl.zeros_like(y) + (reach * share)[:, :, None]) + MIDDLE, 0.0, 2 * MIDDLE)
    # Where all channels are 0 any code will do.
    codes = round_even(tl.where(codes == codes, codes, 0.0))
    levels = (codes - MIDDLE).to(tl.float64)
    if y.shape[1] == 1 and y.shape[2] > DIM:
        levels = tl.where(tl.arange(0, y.shape[2])[None, None, :] < DIM, levels, 0.0)
    along = tl.sum(levels * y.to(tl.float64), 2)
    return codes, along, along * along / tl.sum(levels * levels, 2)


@triton.jit
def _nearer(y, reach, share, codes, along, nearness, MIDDLE: tl.constexpr, DIM: tl.constexpr):
    """Return what was found, or what `share` gives where its direction is nearer."""
    other, other_along, other_nearness = _try(y, reach, share, MIDDLE, DIM)
    is_nearer = other_nearness > nearness
    codes = tl.where(is_nearer[:, :, None], other, codes)
    return codes, tl.where(is_nearer, other_along, along), tl.where(is_nearer, other_nearness, nearness)


@triton.jit
def _turned(x, scale, TURN: tl.constexpr):
    """Return x H for tokens x [BLOCK_T, BLOCK] by sums and differences; TURN channels are turned together."""
    BLOCK_T: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    x = x.to(tl.float64)
    for stage in tl.static_range(10):
        if 1 << stage < TURN:
            pairs = tl.reshape(x, [BLOCK_T, BLOCK >> (stage + 1), 2, 1 << stage])
            a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [BLOCK_T, BLOCK])
    return (x * scale).to(tl.float32)


@triton.jit
def _sound(y, LIMIT: tl.constexpr):
    """Return (y with zeros for tokens that hold a channel beyond LIMIT or NaN, whether a token does [BLOCK_T])."""
    is_unsound = tl.max(tl.where(tl.abs(y) <= LIMIT, 0, 1), 1)  # False for NaN, too
    return tl.where((is_unsound > 0)[:, None], 0.0, y), is_unsound


@triton.jit
def _pack(
    scratch_ptr,  # of the block's codes, [SIZE, DIM] bytes
    codes_ptr,  # of the block's first vector
    stride,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,  # of the part's bits in a code
    OFFSET: tl.constexpr,  # of the part's first byte in the vector
    BLOCK_T: tl.constexpr,
):
    """Write one part of the codes: byte j has the bits of channels j, j + width, j + 2 * width, ..."""
    WIDTH: tl.constexpr = DIM * BITS // 8
    offs = tl.arange(0, BLOCK)[None, :]
    for first in tl.range(0, SIZE, BLOCK_T, num_stages=1):
        offs_t = first + tl.arange(0, BLOCK_T)[:, None]
        total = tl.zeros([BLOCK_T, BLOCK], tl.int32)
        for i in tl.static_range(8 // BITS):
            code = tl.load(scratch_ptr + offs_t * DIM + (i * WIDTH + offs), mask=offs < WIDTH, other=0).to(tl.int32)
            total = total | (((code >> SHIFT) & ((1 << BITS) - 1)) << (i * BITS))
        tl.store(codes_ptr + offs_t * stride + (OFFSET + offs), total.to(tl.uint8), mask=offs < WIDTH)


@triton.jit
def seal_one(
    block,
    place,
    kv_head,
    states_ptr,  # of the block's first token and head
    stride_m,
    exact_ptr,
    codes_ptr,
    token_ptr,
    mean_ptr,
    turn_scale,
    turned_ptr,
    scratch_ptr,
    r0,
    r1,
    r2,
    r3,
    r4,
    NUM_KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    LIMIT: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Seal keys or values of one head of a block."""
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) * 0.5
    is_new = place < 0
    held_ptr = exact_ptr + (tl.maximum(place, 0) * SIZE * NUM_KV_HEADS + kv_head) * DIM
    first_ptr = tl.where(is_new, states_ptr, held_ptr)
    stride = tl.where(is_new, stride_m, NUM_KV_HEADS * DIM)
    offs_d = tl.arange(0, BLOCK)
    mask_d = (offs_d < DIM)[None, :]
    total = tl.zeros([BLOCK], tl.float64)
    num_unsound = 0
    for first in tl.range(0, SIZE, BLOCK_T, num_stages=1):
        offs_t = first + tl.arange(0, BLOCK_T)[:, None]
        x = tl.load(first_ptr + offs_t * stride + offs_d[None, :], mask=mask_d, other=0.0)
        y = _turned(x, turn_scale, TURN)
        tl.store(turned_ptr + offs_t * DIM + offs_d[None, :], y, mask=mask_d)
        y, is_unsound = _sound(y, LIMIT)
        total += tl.sum(y.to(tl.float64), 0)
        num_unsound += tl.sum(is_unsound, 0)
    mean = tl.zeros([BLOCK], tl.float16)
    if mean_ptr is not None:
        mean = (total / tl.maximum(SIZE - num_unsound, 1).to(tl.float64)).to(tl.float32).to(tl.float16)
        tl.store(mean_ptr + (block * NUM_KV_HEADS + kv_head) * DIM + offs_d, mean, mask=offs_d < DIM)
    tl.debug_barrier()  # other threads of the program read what was turned
    GROUPS: tl.constexpr = DIM // GROUP if GROUP < DIM else 1
    offs_g = tl.arange(0, BLOCK // GROUP)[None, :]
    for first in tl.range(0, SIZE, BLOCK_T, num_stages=1):
        offs_t = first + tl.arange(0, BLOCK_T)[:, None]
        y = tl.load(turned_ptr + offs_t * DIM + offs_d[None, :], mask=mask_d, other=0.0)
        y, is_unsound = _sound(y, LIMIT)
        y = tl.reshape(y - mean.to(tl.float32)[None, :], [BLOCK_T, BLOCK // GROUP, GROUP])
        greatest = tl.max(tl.abs(y), 2)
        reach = tl.div_rn(greatest, tl.zeros_like(greatest) + MIDDLE)
        codes, along, nearness = _try(y, reach, r0, MIDDLE, DIM)
        codes, along, nearness = _nearer(y, reach, r1, codes, along, nearness, MIDDLE, DIM)
        codes, along, nearness = _nearer(y, reach, r2, codes, along, nearness, MIDDLE, DIM)
        codes, along, nearness = _nearer(y, reach, r3, codes, along, nearness, MIDDLE, DIM)
        codes, along, nearness = _nearer(y, reach, r4, codes, along, nearness, MIDDLE, DIM)
        wide = y.to(tl.float64)
        s = tl.where(along > 0, tl.sum(wide * wide, 2) / along, 0.0).to(tl.float32)
        s = tl.where((is_unsound > 0)[:, None], float("nan"), s)
        rows = (block * SIZE + offs_t) * NUM_KV_HEADS + kv_head
        tl.store(token_ptr + rows * GROUPS + offs_g, s.to(tl.float16), mask=offs_g < GROUPS)
        codes = tl.reshape(codes, [BLOCK_T, BLOCK]).to(tl.uint8)
        tl.store(scratch_ptr + offs_t * DIM + offs_d[None, :], codes, mask=mask_d)
    tl.debug_barrier()  # other threads of the program pack them
    WIDTH: tl.constexpr = DIM * BITS // 8
    codes_ptr += (block * SIZE * NUM_KV_HEADS + kv_head) * WIDTH
    if BITS == 3:
        _pack(scratch_ptr, codes_ptr, NUM_KV_HEADS * WIDTH, SIZE, DIM, BLOCK, 2, 0, 0, BLOCK_T)
        _pack(scratch_ptr, codes_ptr, NUM_KV_HEADS * WIDTH, SIZE, DIM, BLOCK, 1, 2, DIM // 4, BLOCK_T)
    else:
        _pack(scratch_ptr, codes_ptr, NUM_KV_HEADS * WIDTH, SIZE, DIM, BLOCK, BITS, 0, 0, BLOCK_T)
