"""What fits on a card or in a budget beside the weights: the longest context, the most rows.

Memory is what the cache takes, blocks that its pools reserve ahead included: what is reserved cannot be used otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.inputs import parse_bytes

# Left to activations, the CUDA context and the allocator's own waste: the share that vLLM leaves by default.
CARD_SHARE = 0.9
_MOST_TOKENS, _MOST_ROWS = 1 << 30, 1 << 20

Needed = Callable[[int, int], float]
"""Bytes of KV that so many rows of so many tokens take."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What fits beside the weights, sizes in bytes.

    `max_context` and `max_batch` are those of the cache as it was asked for; the `capped_` ones those with `max_tokens`
    set to just what they take, so that nothing is reserved ahead. None where nothing grows with the text, 0 where
    nothing fits.
    """

    budget_bytes: int
    kv_budget_bytes: int  # beside the weights; negative where these alone do not fit
    needed_bytes: float  # that the cache asked for takes, reserved blocks included
    max_context: int | None  # tokens a row, at the batch asked for
    max_batch: int | None  # rows, at the context asked for
    capped_context: int | None
    capped_batch: int | None

    @property
    def fits(self) -> bool:
        """Whether the cache asked for fits beside the weights."""
        return self.needed_bytes <= self.kv_budget_bytes


def capacity(
    needed: Needed,  # by the cache as it was asked for
    capped: Needed,  # with max_tokens set to what they take
    batch: int,
    context: int,
    weight_bytes: int,
    device: Device | None,
    budget: int | str | None,
) -> Capacity | None:
    """Return what `budget`, else `CARD_SHARE` of `device`, holds; None without either."""
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
    """Return the largest number that fits, 0 where none does; None where the limit itself does."""
    if fits(limit):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
