"""Capacity of a device or a budget beside the weights: the longest context, the most rows.

Memory counts the blocks that pools reserve ahead: nothing else can use them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.inputs import parse_bytes

# The share that vLLM uses by default; the rest is for activations, the CUDA context and the allocator's waste.
CARD_SHARE = 0.9
_MOST_TOKENS, _MOST_ROWS = 1 << 30, 1 << 20

Needed = Callable[[int, int], float]
"""Bytes of KV as a function of rows and tokens of each row."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Capacity beside the weights, sizes in bytes.

    `max_context` and `max_batch` hold for the cache as asked for; the `capped_` ones for a cache whose `max_tokens` is
    exactly what they need, so that nothing is reserved ahead. None means no limit (nothing grows with the text), 0 that
    nothing fits.
    """

    budget_bytes: int
    kv_budget_bytes: int  # beside the weights; negative if they alone do not fit
    needed_bytes: float  # taken by the cache as asked for, reserved blocks included
    max_context: int | None  # tokens of a row, at the batch asked for
    max_batch: int | None  # rows, at the context asked for
    capped_context: int | None
    capped_batch: int | None

    @property
    def fits(self) -> bool:
        """Return whether the cache as asked for fits beside the weights."""
        return self.needed_bytes <= self.kv_budget_bytes


def capacity(
    needed: Needed,  # bytes of the cache as asked for
    capped: Needed,  # bytes with max_tokens set to what they need
    batch: int,
    context: int,
    weight_bytes: int,
    device: Device | None,
    budget: int | str | None,
) -> Capacity | None:
    """Return the capacity of `budget`, else of `CARD_SHARE` of `device`; None without either."""
    if budget is not None:
        size = parse_bytes(budget, "budget")
    elif device is not None:
        size = int(device.memory_bytes * CARD_SHARE)
    else:
        return None
    room = size - weight_bytes

    def contexts(take: Needed) -> int | None:
        return largest(lambda tokens: take(batch, tokens) <= room, _MOST_TOKENS)

    def batches(take: Needed) -> int | None:
        return largest(lambda rows: take(rows, context) <= room, _MOST_ROWS)

    return Capacity(
        budget_bytes=size,
        kv_budget_bytes=room,
        needed_bytes=needed(batch, context),
        max_context=contexts(needed),
        max_batch=batches(needed),
        capped_context=contexts(capped),
        capped_batch=batches(capped),
    )


def largest(fits: Callable[[int], bool], limit: int) -> int | None:
    """Return the largest number below `limit` that fits, 0 if none does; None if `limit` fits."""
    if fits(limit):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
