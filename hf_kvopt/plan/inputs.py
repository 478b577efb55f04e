"""Sizes in human units: parses `24GiB`, `80GB`, `32k`, and formats sizes for output.

k, M    of tokens    1,024 and 1,048,576, as context lengths are named (32k = 32,768; write 32000 for thousands)
GB, MB  of bytes     powers of 1,000, as on datasheets     GiB, MiB  powers of 1,024
"""

import math

from hf_kvopt.config import BadInput, parse_bytes, parse_tokens

__all__ = ["BadInput", "parse_bytes", "parse_tokens", "require_positive", "show_bytes", "show_number"]


def require_positive(value: object, field: str, example: int) -> int:
    """Return `value` if it is a whole number of at least 1.

    Raises:
        BadInput: it is not one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"{field} must be a whole number of at least 1: got {value!r}; for example {field}={example}")
    return value


def show_bytes(size: float) -> str:
    """Format bytes with a unit of powers of 1,024: `35.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def show_number(value: float) -> str:
    """Format a measure with three digits, never with an exponent: `0.0123`, `3.14`, `38.4`, `9,041`."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(4, max(0, digits))}f}"
