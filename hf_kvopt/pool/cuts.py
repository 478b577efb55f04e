"""Cuts of the rows of a block table: what rows end with, and whether a table still holds it."""

from collections.abc import Sequence

from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.addresses import Addresses


def after_cut(table: Addresses, lengths: Sequence[int]) -> tuple[list[int], int]:
    """Return lags and clock once row i has `lengths[i]` tokens; raise CacheStateError where it has fewer."""
    removed = [old - new for old, new in zip(table.lengths, lengths, strict=True)]
    if min(removed, default=0) < 0:
        raise CacheStateError(f"rows can only be cut: got {list(lengths)} tokens for rows that hold {table.lengths}")
    if min(lengths, default=0) < 0:
        raise CacheStateError(f"cannot crop to {min(lengths)} tokens: got a cache that holds {table.lengths}")
    clock = table.clock - min(removed, default=0)
    return [clock - length for length in lengths], clock


def require_held(table: Addresses, lags: Sequence[int], clock: int, window: int | None) -> None:
    """Raise CacheStateError unless `table` holds what rows of these lags show of up to column `clock`."""
    if clock < 0 or table.base > (0 if window is None else max(0, clock - max(lags) - window + 1)):
        raise CacheStateError(
            f"cannot crop to {clock} tokens: got a cache that holds tokens {table.base} to {table.clock}; "
            "call cache.activate_past_recording() before the forward that is to be undone, and crop only its tokens"
        )
