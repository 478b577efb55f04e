"""Sizes as people write them: `24GiB`, `80GB`, `32k`; and the error for what cannot be understood.

k, M    of tokens    1,024 and 1,048,576, as context lengths are named (32k = 32,768; write 32000 for thousands)
GB, MB  of bytes     powers of 1,000, as cards are sold     GiB, MiB  powers of 1,024
"""

import re

_BYTE_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _BYTE_UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_TOKEN_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_NUMBER = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)")


class BadInput(ValueError):
    """A setting, config or file that cannot be used: names the field, what it got, and a right example."""


def parse_bytes(text: str | int, field: str = "budget") -> int:
    """Return the bytes of a size such as `24GiB`, `80GB` or a plain number of bytes.

    Raises:
        BadInput: not a positive size with a known unit.
    """
    return _parse(text, field, _BYTE_UNITS | {"": 1}, "bytes such as 24GiB or 80GB")


def parse_tokens(text: str | int, field: str = "context") -> int:
    """Return the tokens of a length such as `32k` (32,768), `1M` or `32000`.

    Raises:
        BadInput: not a positive whole number of tokens.
    """
    return _parse(text, field, _TOKEN_UNITS, "tokens such as 32k or 32000")


def require_positive(value: object, field: str, example: int) -> int:
    """Return `value` if it is a whole number of at least 1.

    Raises:
        BadInput: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"{field} must be a whole number of at least 1: got {value!r}; for example {field}={example}")
    return value


def show_bytes(size: float) -> str:
    """Write bytes with a unit of 1,024: `35.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _parse(text: str | int, field: str, units: dict[str, int], example: str) -> int:
    wrong = f"{field} must be {example}: got {text!r}"
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise BadInput(wrong)
    if isinstance(text, int):
        value: float = text
    else:
        found = _NUMBER.fullmatch(text.strip())
        if found is None:
            raise BadInput(wrong)
        number, unit = found[1].replace(",", "").replace("_", ""), found[2].upper()
        if unit not in units:
            raise BadInput(f"{wrong}, whose unit {found[2]!r} is unknown")
        value = float(number) * units[unit]
    if value < 1 or value != int(value):
        raise BadInput(f"{wrong}, which is not a whole number of at least 1")
    return int(value)
