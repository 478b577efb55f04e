"""Settings as frozen objects that work with their defaults and reject invalid values.

Numbers of tokens are written alike in Python and on the command line: 32768, "32768" or "32k"; sizes as "24GiB".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

_TOKEN_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_BYTE_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _BYTE_UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_NUMBER = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)")


class BadInput(ValueError):
    """A setting, config or file that cannot be used; the message names the field, what it got, and a valid example."""


def parse_tokens(value: str | int, field: str = "context") -> int:
    """Return a number of tokens, written as 32768, "32768" or "32k"; k is 1,024 and M is 1,048,576.

    Args:
        value: the number, with units as in the names of contexts (32k = 32,768); write 32000 for thousands.
        field: name of the setting, for the error.

    Raises:
        BadInput: not a positive whole number of tokens.
    """
    return parse_size(value, field, _TOKEN_UNITS, "a positive number of tokens such as 32000 or '32k'")


def parse_bytes(text: str | int, field: str = "budget") -> int:
    """Return the bytes of a size such as `24GiB`, `80 GB` or a plain number of bytes.

    Raises:
        BadInput: not a positive size with a known unit.
    """
    return parse_size(text, field, _BYTE_UNITS, "bytes such as 24GiB or 80GB")


def parse_size(
    value: str | int,
    field: str,
    units: Mapping[str, int],  # by name in capitals; "" is no unit
    expected: str,
) -> int:
    """Return a positive whole number of units, written with one of `units` after it or as a plain number.

    Raises:
        BadInput: not such a number; the message states what was expected.
    """
    wrong = f"{field} must be {expected}: got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadInput(wrong)
    size: float = value if isinstance(value, int) else 0
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value.strip())
        if found is None:
            raise BadInput(wrong)
        number, unit = found[1].replace(",", "").replace("_", ""), found[2].upper()
        if unit not in units:
            raise BadInput(f"{wrong}, whose unit {found[2]!r} is unknown")
        size = float(number) * units[unit]
    if size < 1 or size != int(size):
        raise BadInput(f"{wrong}, which is not a whole number of at least 1")
    return int(size)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Layout and limits of the memory of a paged cache.

    Args:
        block_size: tokens of a block, a power of two from 16 to 256. Smaller blocks waste less at the end of each row.
        max_tokens: cap on the tokens held over all rows of the batch, such as 32768 or "32k", rounded up to blocks;
            None grows as needed. Stored as a number.
        compileable: fixed capacity with lengths on the device, so that `generate()` compiles the decode step; needs
            `max_tokens`, which is then the capacity over all rows, each row's share rounded up to blocks. Off by
            default, because transformers compiles every plain `generate` whose cache allows it.

    Raises:
        ValueError: a value is invalid; the message states the valid ones.

    Source: blocks as in PagedAttention, arXiv:2309.06180; compiling without recompiling, transformers issue #30055.
    """

    block_size: int = 16
    max_tokens: int | str | None = None
    compileable: bool = False

    def __post_init__(self) -> None:
        size = self.block_size
        if not isinstance(size, int) or isinstance(size, bool) or not 16 <= size <= 256 or size & (size - 1):
            raise ValueError(f"block_size must be a power of two from 16 to 256: got {size!r}")
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", parse_tokens(self.max_tokens, "max_tokens"))
        if self.compileable and self.max_tokens is None:
            raise ValueError(
                "compileable=True needs max_tokens, the fixed capacity over all rows: got None; pass "
                "max_tokens=batch_size * (prompt tokens + max_new_tokens)"
            )

    @property
    def max_blocks(self) -> int | None:
        """`max_tokens` in blocks, rounded up."""
        return None if self.max_tokens is None else -(-cast(int, self.max_tokens) // self.block_size)
