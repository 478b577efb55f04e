"""Codes of sealed blocks as operands of `tl.dot`, unpacked in registers; see `quant.sealed_formats` for their bytes.

Codes are unsigned and cut so that each piece divides a byte. A vector is read as elements of 8 or 16 bits, and plane j
holds one code of each element:

    bits    element    planes    channel of element e in plane j
    2, 3    uint8      4         j * dim / 4 + e                      (3: the third bits are read from their own bytes)
    4       int16      4         (j % 2) * dim / 2 + 2 * e + j // 2
    8       int16      2         2 * e + j

Keys become float16 by their bits alone: a code c is the subnormal number c * 2^-24 (4 bits: 16 times that in odd
planes), which the queries' planes undo. Values become bfloat16, exactly c less the middle of all codes, which is what a
symmetric codec multiplies with s. The PTX is for NVIDIA cards; elsewhere, and under the interpreter, plain Triton
computes the same values.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.codes import key_planes
from hf_kvopt.kernels.triton.optional import tl, triton


def _small_codes(num_inputs: int, kind: str) -> str:
    """Return PTX that makes four planes of 4 bytes of 2-bit codes, with a byte of third bits beside each where two
    registers come in; `kind` is "keys" or "values"."""
    low, high = "$8", "$9"
    # Keys: the code in the low byte. Values: 64 + code in bfloat16, whose last bit is worth 1/2, less 64 + middle.
    up = int(kind == "values")
    lines = [".reg .b32 t, u, one, minus;"]
    if up:
        minus = 0xC283C283 if num_inputs == 1 else 0xC287C287
        lines += ["mov.b32 one, 0x3f803f80;", f"mov.b32 minus, 0x{minus:08x};"]
    fill = 0x80808080 if up else 0
    for plane in range(4):
        lines += _moved("t", low, up - 2 * plane)
        lines += [f"lop3.b32 t, t, 0x{0x03030303 << up:08x}, 0x{fill:08x}, 0xea;"]
        if num_inputs == 2:
            lines += _moved("u", high, 2 + up - 2 * plane)
            lines += [f"lop3.b32 t, u, 0x{0x04040404 << up:08x}, t, 0xea;"]
        for half, selector in enumerate(("0x4140", "0x4342")):
            out = f"${2 * plane + half}"
            lines += [f"prmt.b32 {out}, t, 0x{0x42424242 if up else 0:08x}, {selector};"]
            lines += [f"fma.rn.bf16x2 {out}, {out}, one, minus;"] if up else []
    return "{\n    " + "\n    ".join(lines) + "\n}"


def _moved(target: str, source: str, bits: int) -> list[str]:
    """Return PTX that shifts a register to the left by `bits`, which may be negative."""
    if not bits:
        return [f"mov.b32 {target}, {source};"]
    name = "shl.b32" if bits > 0 else "shr.u32"
    return [f"{name} {target}, {source}, {abs(bits)};"]


_TWO_VALUES = tl.constexpr(_small_codes(1, "values"))
_THREE_KEYS = tl.constexpr(_small_codes(2, "keys"))
_THREE_VALUES = tl.constexpr(_small_codes(2, "values"))
# 64 + code in bfloat16, whose last bit is worth 1/2, less 71.5.
_FOUR_VALUES = tl.constexpr("""{
    .reg .b32 t, one, minus;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xc28fc28f;
    shl.b32 t, $4, 1;
    lop3.b32 t, t, 0x001e001e, 0x42804280, 0xea;
    fma.rn.bf16x2 $0, t, one, minus;
    shr.u32 t, $4, 3;
    lop3.b32 t, t, 0x001e001e, 0x42804280, 0xea;
    fma.rn.bf16x2 $1, t, one, minus;
    shr.u32 t, $4, 7;
    lop3.b32 t, t, 0x001e001e, 0x42804280, 0xea;
    fma.rn.bf16x2 $2, t, one, minus;
    shr.u32 t, $4, 11;
    lop3.b32 t, t, 0x001e001e, 0x42804280, 0xea;
    fma.rn.bf16x2 $3, t, one, minus;
}""")
_EIGHT_KEYS = tl.constexpr("""{
    .reg .b32 t;
    and.b32 $0, $2, 0x00ff00ff;
    shr.u32 t, $2, 8;
    and.b32 $1, t, 0x00ff00ff;
}""")

_TWO_PLANES = tl.constexpr("=&r,=&r,r")
_PAIRS = tl.constexpr("=&r,=&r,=&r,=&r,r")
_BYTES = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r")
_BYTES_AND_BITS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@triton.jit
def plane_width(BITS: tl.constexpr, DIM: tl.constexpr):
    """Return the channels of one plane."""
    return DIM // 2 if BITS == 8 else DIM // 4


@triton.jit
def plane_channels(PLANE: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return the channels [BLOCK_W] of a plane's elements; those from `plane_width` on mean nothing."""
    offs = tl.arange(0, BLOCK_W)
    if BITS == 8:
        return 2 * offs + PLANE
    elif BITS == 4:
        return (PLANE % 2) * (DIM // 2) + 2 * offs + PLANE // 2
    else:
        return PLANE * (DIM // 4) + offs


@triton.jit
def load_codes(
    codes_ptr,  # int16 for 4 and 8 bits, else uint8
    base,  # int64
    rows,  # [BLOCK_N] rows from `base` on, of the codes seen as [slots * num_kv_heads, width]; all exist
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Return elements [BLOCK_N, BLOCK_W] and, of 3-bit codes, the bytes of their third bits moved to the place of plane
    0's; of other codes the elements again."""
    offs = tl.arange(0, BLOCK_W)[None, :]
    if BITS == 3:
        ptrs = codes_ptr + base * (DIM // 8 * 3) + rows[:, None] * (DIM // 8 * 3)
        x = _load_row(ptrs + offs, offs, DIM // 4, BLOCK_W)
        high = _load_row(ptrs + (DIM // 4 + offs % (DIM // 8)), offs, DIM // 4, BLOCK_W)
        return x, high >> (offs // (DIM // 8)).to(tl.uint8)
    else:
        WIDTH: tl.constexpr = DIM // 4 if BITS == 2 else DIM * BITS // 16
        x = _load_row(codes_ptr + base * WIDTH + (rows[:, None] * WIDTH + offs), offs, WIDTH, BLOCK_W)
        return x, x


@triton.jit
def _load_row(ptrs, offs, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    if WIDTH == BLOCK_W:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=offs < WIDTH, other=0)


@triton.jit
def plane_codes(x, high, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Return one plane's codes as int16."""
    if BITS == 8:
        return (x >> (8 * PLANE)) & 255
    elif BITS == 4:
        return (x >> (4 * PLANE)) & 15
    elif BITS == 2:
        return ((x >> (2 * PLANE)) & 3).to(tl.int16)
    else:
        return (((x >> (2 * PLANE)) & 3) | (((high >> (2 * PLANE)) & 1) << 2)).to(tl.int16)


@triton.jit
def _key_plane(x, high, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, BIASED: tl.constexpr):
    codes = plane_codes(x, high, PLANE, BITS)
    if BIASED:
        return codes.to(tl.float16, bitcast=True)
    else:
        return codes.to(DTYPE)


@triton.jit
def sealed_key_planes(
    x,
    high,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BIASED: tl.constexpr,  # as subnormal float16, see the module
    PTX: tl.constexpr,
):
    """Return planes 0 to 3 of keys; the last two repeat the first two where there are two."""
    if BIASED and BITS == 4:
        return key_planes(x, "int4", DTYPE, True, PTX)
    elif BIASED and PTX and BITS == 3:
        return tl.inline_asm_elementwise(
            _THREE_KEYS, _BYTES_AND_BITS, [x, high], (tl.float16, tl.float16, tl.float16, tl.float16), True, 4
        )
    elif BIASED and PTX and BITS == 8:
        k0, k1 = tl.inline_asm_elementwise(_EIGHT_KEYS, _TWO_PLANES, [x], (tl.float16, tl.float16), True, 2)
        return k0, k1, k0, k1
    else:
        k0 = _key_plane(x, high, 0, BITS, DTYPE, BIASED)
        k1 = _key_plane(x, high, 1, BITS, DTYPE, BIASED)
        if BITS == 8:
            return k0, k1, k0, k1
        else:
            k2 = _key_plane(x, high, 2, BITS, DTYPE, BIASED)
            return k0, k1, k2, _key_plane(x, high, 3, BITS, DTYPE, BIASED)


@triton.jit
def _value_plane(x, high, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    return (plane_codes(x, high, PLANE, BITS).to(tl.float32) - ((1 << BITS) - 1) * 0.5).to(DTYPE)


@triton.jit
def sealed_value_planes(x, high, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Return planes 0 to 3 of values less the middle of all codes; BITS is 2, 3 or 4."""
    if PTX and BITS == 4:
        return tl.inline_asm_elementwise(
            _FOUR_VALUES, _PAIRS, [x], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    elif PTX and BITS == 3:
        return tl.inline_asm_elementwise(
            _THREE_VALUES, _BYTES_AND_BITS, [x, high], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 4
        )
    elif PTX:
        return tl.inline_asm_elementwise(
            _TWO_VALUES, _BYTES, [x], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 4
        )
    else:
        v0 = _value_plane(x, high, 0, BITS, DTYPE)
        v1 = _value_plane(x, high, 1, BITS, DTYPE)
        return v0, v1, _value_plane(x, high, 2, BITS, DTYPE), _value_plane(x, high, 3, BITS, DTYPE)
