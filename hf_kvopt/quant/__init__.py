"""Storage formats of keys and values."""

from hf_kvopt.quant.formats import FORMATS, Format, format_of, get_format
from hf_kvopt.quant.reference import Quantized, dequantize, quantize, unpack_int4

__all__ = ["FORMATS", "Format", "Quantized", "dequantize", "format_of", "get_format", "quantize", "unpack_int4"]
