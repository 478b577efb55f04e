"""Stored codes as operands of `tl.dot`, unpacked two at a time in registers.

A quantized pool is read as int16, so that an element holds 2 byte codes or 4 nibbles and tiles move through shared
memory by the same wide instructions as 16-bit floats. Of P planes plane j holds channels j, j + P, j + 2 P, ...: each
is multiplied with its own share of the query's channels, or summed into its own share of the output's, and nothing is
interleaved.

    keys      float16, the cheapest form: an integer code c arrives as (c + bias) * 2^-24, that is, as the bits of a
              subnormal number (int4 at odd planes 16 times that); `load_query` undoes it on the queries' side
    values    bfloat16, exactly the codes (float16 may not resolve probabilities that carry a scale)

Both are exact: codes have at most 8 significant bits. The PTX is for NVIDIA cards, where Triton's own code for the same
handles each 16-bit half alone: 845 instead of 530 instructions in the loop of an int8 decode on sm_90. Elsewhere, and
under the interpreter, plain Triton computes the same values.
"""

from __future__ import annotations

from hf_kvopt.kernels.triton.optional import tl, triton

KEY_UNIT = 2.0**24  # what an integer key's operand has to be multiplied with

_INT8_KEYS = tl.constexpr("""{
    .reg .b32 t;
    lop3.b32 $0, $2, 0x00ff00ff, 0x00800080, 0x6a;
    shr.u32 t, $2, 8;
    lop3.b32 $1, t, 0x00ff00ff, 0x00800080, 0x6a;
}""")
_INT4_KEYS = tl.constexpr("""{
    .reg .b32 t;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, $4, 0x00f000f0;
    shr.u32 t, $4, 8;
    and.b32 $2, t, 0x000f000f;
    and.b32 $3, t, 0x00f000f0;
}""")
_E4M3_KEYS = tl.constexpr("""{
    .reg .b32 t;
    .reg .b16 even, odd;
    prmt.b32 t, $2, $2, 0x3120;
    mov.b32 {even, odd}, t;
    cvt.rn.f16x2.e4m3x2 $0, even;
    cvt.rn.f16x2.e4m3x2 $1, odd;
}""")
# The high byte of a float16.
_E5M2_KEYS = tl.constexpr("""{
    .reg .b32 t;
    shl.b32 t, $2, 8;
    and.b32 $0, t, 0xff00ff00;
    and.b32 $1, $2, 0xff00ff00;
}""")
# The last 7 bits behind 128, less 128 or, under a sign, less 256.
_INT8_VALUES = tl.constexpr("""{
    .reg .b32 t, low, sign, minus;
    mov.b32 minus, 0xbf80bf80;
    lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, sign, minus, low;
    shr.u32 t, $2, 8;
    lop3.b32 low, t, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 sign, t, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, sign, minus, low;
}""")
# The last bits of 128, less 136.
_INT4_VALUES = tl.constexpr("""{
    .reg .b32 t, one, minus;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xc308c308;
    lop3.b32 t, $4, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, t, one, minus;
    shr.u32 t, $4, 4;
    lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, t, one, minus;
    shr.u32 t, $4, 8;
    lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $2, t, one, minus;
    shr.u32 t, $4, 12;
    lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $3, t, one, minus;
}""")
# Exponent and mantissa moved to their place in bfloat16, times 2^120 for the other bias of the exponent.
_E4M3_VALUES = tl.constexpr("""{
    .reg .b32 t, sign, unit, zero;
    mov.b32 unit, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    shl.b32 t, $2, 8;
    and.b32 sign, t, 0x80008000;
    shr.u32 t, t, 4;
    lop3.b32 t, t, 0x07f007f0, sign, 0xea;
    fma.rn.bf16x2 $0, t, unit, zero;
    and.b32 sign, $2, 0x80008000;
    shr.u32 t, $2, 4;
    lop3.b32 t, t, 0x07f007f0, sign, 0xea;
    fma.rn.bf16x2 $1, t, unit, zero;
}""")
# The same with one bit more of exponent: 2^112.
_E5M2_VALUES = tl.constexpr("""{
    .reg .b32 t, sign, unit, zero;
    mov.b32 unit, 0x77807780;
    mov.b32 zero, 0x80008000;
    shl.b32 t, $2, 8;
    and.b32 sign, t, 0x80008000;
    shr.u32 t, t, 3;
    lop3.b32 t, t, 0x0fe00fe0, sign, 0xea;
    fma.rn.bf16x2 $0, t, unit, zero;
    and.b32 sign, $2, 0x80008000;
    shr.u32 t, $2, 3;
    lop3.b32 t, t, 0x0fe00fe0, sign, 0xea;
    fma.rn.bf16x2 $1, t, unit, zero;
}""")

# Registers: each of two int16 (the input) or of two 16-bit floats.
_TWO, _FOUR = tl.constexpr("=&r,=&r,r"), tl.constexpr("=&r,=&r,=&r,=&r,r")


@triton.jit
def _two_keys(x, ASM: tl.constexpr):
    """Run PTX that makes two float16 planes."""
    k0, k1 = tl.inline_asm_elementwise(ASM, _TWO, [x], (tl.float16, tl.float16), True, 2)
    return k0, k1, k0, k1


@triton.jit
def _two_values(x, ASM: tl.constexpr):
    """Run PTX that makes two bfloat16 planes."""
    v0, v1 = tl.inline_asm_elementwise(ASM, _TWO, [x], (tl.bfloat16, tl.bfloat16), True, 2)
    return v0, v1, v0, v1


@triton.jit
def _plane(x, PLANE: tl.constexpr, CODES: tl.constexpr, DTYPE: tl.constexpr):
    """Return one plane's codes as DTYPE."""
    if CODES == "int4":
        return (((x >> (4 * PLANE)) & 15) - 8).to(DTYPE)
    elif CODES == "int8":
        return ((x << (8 - 8 * PLANE)) >> 8).to(DTYPE)
    elif CODES == "fp8_e4m3":
        return ((x >> (8 * PLANE)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return ((x >> (8 * PLANE)) & 255).to(tl.uint8).to(tl.float8e5, bitcast=True).to(DTYPE)


@triton.jit
def _biased_plane(x, PLANE: tl.constexpr, CODES: tl.constexpr):
    """Return one plane's integer codes as float16 subnormals."""
    if CODES == "int4":
        return ((x >> (8 * (PLANE // 2))) & (15 << (4 * (PLANE % 2)))).to(tl.float16, bitcast=True)
    else:
        return (((x >> (8 * PLANE)) & 255) ^ 128).to(tl.float16, bitcast=True)


@triton.jit
def key_planes(x, CODES: tl.constexpr, DTYPE: tl.constexpr, BIASED: tl.constexpr, PTX: tl.constexpr):
    """Return planes 0 to 3 of keys x (int16); the last two repeat the first two where there are two."""
    # The integers of these instructions stand for codes and a bias, which the query's plane sums must take away.
    tl.static_assert(BIASED or not PTX or (CODES != "int4" and CODES != "int8"), "PTX keys need BIASED")
    if PTX and CODES == "int4":
        return tl.inline_asm_elementwise(
            _INT4_KEYS, _FOUR, [x], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    elif PTX and CODES == "int8":
        return _two_keys(x, _INT8_KEYS)
    elif PTX and CODES == "fp8_e4m3":
        return _two_keys(x, _E4M3_KEYS)
    elif PTX:
        return _two_keys(x, _E5M2_KEYS)
    elif BIASED:
        k0, k1 = _biased_plane(x, 0, CODES), _biased_plane(x, 1, CODES)
        if CODES == "int4":
            return k0, k1, _biased_plane(x, 2, CODES), _biased_plane(x, 3, CODES)
        else:
            return k0, k1, k0, k1
    else:
        return _plain_planes(x, CODES, DTYPE)


@triton.jit
def value_planes(x, CODES: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Return planes 0 to 3 of values x (int16); the last two repeat the first two where there are two."""
    if PTX and CODES == "int4":
        return tl.inline_asm_elementwise(
            _INT4_VALUES, _FOUR, [x], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    elif PTX and CODES == "int8":
        return _two_values(x, _INT8_VALUES)
    elif PTX and CODES == "fp8_e4m3":
        return _two_values(x, _E4M3_VALUES)
    elif PTX:
        return _two_values(x, _E5M2_VALUES)
    else:
        return _plain_planes(x, CODES, DTYPE)


@triton.jit
def _plain_planes(x, CODES: tl.constexpr, DTYPE: tl.constexpr):
    p0, p1 = _plane(x, 0, CODES, DTYPE), _plane(x, 1, CODES, DTYPE)
    if CODES == "int4":
        return p0, p1, _plane(x, 2, CODES, DTYPE), _plane(x, 3, CODES, DTYPE)
    else:
        return p0, p1, p0, p1
