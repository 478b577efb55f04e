"""Storage formats of keys and values, and their quantization in torch."""

from hf_kvopt.quant.formats import (
    FORMATS,
    KV_FORMATS,
    NATIVE,
    NATIVE_KV,
    SCALE_DTYPE,
    Format,
    KVFormat,
    format_of,
    get_format,
    get_kv_format,
)
from hf_kvopt.quant.guard import (
    CENTRE_TOKENS,
    NO_GUARD,
    Guard,
    centre_of,
    guard_for,
    guarded,
    hadamard,
    rotate,
    unguarded,
)
from hf_kvopt.quant.policy import FormatPolicy
from hf_kvopt.quant.reference import Quantized, dequantize, quantize, unpack_int4, widen, widen_planes

__all__ = [
    "CENTRE_TOKENS",
    "FORMATS",
    "KV_FORMATS",
    "NATIVE",
    "NATIVE_KV",
    "NO_GUARD",
    "SCALE_DTYPE",
    "Format",
    "FormatPolicy",
    "Guard",
    "KVFormat",
    "Quantized",
    "centre_of",
    "dequantize",
    "format_of",
    "get_format",
    "get_kv_format",
    "guard_for",
    "guarded",
    "hadamard",
    "quantize",
    "rotate",
    "unguarded",
    "unpack_int4",
    "widen",
    "widen_planes",
]
