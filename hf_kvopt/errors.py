"""Errors of hf_kvopt about state; wrong arguments raise `ValueError` or `TypeError`.

    KVOptError
    ├── OutOfBlocks          the pool's cap on tokens is reached
    ├── CacheStateError      a cache used in a way that would give wrong tokens
    ├── UnsupportedModel     the model needs something that this attention or cache does not have
    └── UnsupportedDevice    the device cannot run the format or kernel that was asked for

Every message states what, got, expected, and what to do. A cache stays usable after any of them.
"""

import difflib
from collections import abc
from typing import Self


def nearest(name: object, known: abc.Iterable[str]) -> str:
    """Return "; did you mean 'block_size'?" to end a message about an unknown name; "" if no known name is similar."""
    by_lower = {each.lower(): each for each in sorted(known)}
    said = str(name).lower()
    longer = [each for each in by_lower if said and each.startswith(said)]
    alike = longer or difflib.get_close_matches(said, by_lower, n=1)
    return f"; did you mean {by_lower[alike[0]]!r}?" if alike else ""


class KVOptError(RuntimeError):
    """Base of all errors about the state of a cache, a model or a device."""


class OutOfBlocks(KVOptError):
    """A request for more tokens, in whole blocks, than the pool's cap leaves; nothing was taken."""

    @classmethod
    def asked_for(cls, num_blocks: int, num_left: int, num_total: int, block_size: int) -> Self:
        """Make the error of `num_blocks` blocks where `num_left` of `num_total` are left, told in tokens first."""
        asked, left, total = (number * block_size for number in (num_blocks, num_left, num_total))
        return cls(
            f"room for {asked:,} more tokens was asked for: got {left:,} of {total:,} left (in blocks of "
            f"{block_size}: {num_blocks:,} asked for, {num_left:,} of {num_total:,} left); raise max_tokens to "
            f"{total - left + asked:,} or more, generate fewer rows or tokens at once, or free() caches that share "
            "this pool"
        )


class CacheStateError(KVOptError):
    """A cache that does not fit the call: other model, other batch, or a length that would corrupt the output."""


class UnsupportedModel(KVOptError):
    """A model that needs something that hf_kvopt cannot provide without risking a wrong token."""


class UnsupportedDevice(KVOptError):
    """A device that lacks what the requested format or kernel needs."""
