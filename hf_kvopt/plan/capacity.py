"""What fits on a card or in a budget beside the weights: the longest context, the most rows."""

from collections.abc import Callable
from dataclasses import dataclass

from hf_kvopt.plan.devices import Device, get_device
from hf_kvopt.plan.inputs import BadInput, parse_bytes, show_bytes

# Left to activations, the CUDA context and the allocator's own waste: the share that vLLM leaves by default.
CARD_SHARE = 0.9
_MOST_TOKENS, _MOST_ROWS = 1 << 30, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What fits beside the weights, sizes in bytes. None where nothing grows with the text."""

    budget_bytes: int
    kv_budget_bytes: int
    max_context: int | None  # tokens a row, at the batch asked for
    max_batch: int | None  # rows, at the context asked for


def capacity(
    needed: Callable[[int, int], float],  # bytes of KV for so many rows of so many tokens
    batch: int,
    context: int,
    weight_bytes: int,
    device: str | Device | None,
    budget: int | str | None,
) -> Capacity | None:
    """Return what `budget`, else `CARD_SHARE` of `device`, holds; None without either.

    Raises:
        BadInput: the weights alone do not fit.
    """
    if budget is not None:
        size = parse_bytes(budget, "budget")
    elif device is not None:
        known = get_device(device) if isinstance(device, str) else device
        size = int(known.memory_bytes * CARD_SHARE)
    else:
        return None
    room = size - weight_bytes
    if room <= 0:
        raise BadInput(
            f"budget of {show_bytes(size)} is impossible: the weights alone take {show_bytes(weight_bytes)}; expected "
            f"more, for example budget='{-(-weight_bytes * 5 // 4 // 2**30)}GiB', or a quantized model"
        )
    return Capacity(
        budget_bytes=size,
        kv_budget_bytes=room,
        max_context=_largest(lambda tokens: needed(batch, tokens) <= room, _MOST_TOKENS),
        max_batch=_largest(lambda rows: needed(rows, context) <= room, _MOST_ROWS),
    )


def _largest(fits: Callable[[int], bool], limit: int) -> int | None:
    """The largest number that fits; None where the limit itself does."""
    if fits(limit):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
