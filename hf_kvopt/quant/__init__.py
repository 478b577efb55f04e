"""Storage formats of keys and values."""

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
from hf_kvopt.quant.policy import FormatPolicy
from hf_kvopt.quant.reference import Quantized, dequantize, quantize, unpack_int4, widen, widen_planes

__all__ = [
    "FORMATS",
    "KV_FORMATS",
    "NATIVE",
    "NATIVE_KV",
    "SCALE_DTYPE",
    "Format",
    "FormatPolicy",
    "KVFormat",
    "Quantized",
    "dequantize",
    "format_of",
    "get_format",
    "get_kv_format",
    "quantize",
    "unpack_int4",
    "widen",
    "widen_planes",
]
