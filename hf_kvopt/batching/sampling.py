"""Sampling of many rows: those of like settings are warped together, each draws by its own generator.

    row a   temperature 0.7, top_p 0.9   ┐
    row c   temperature 0.7, top_p 0.9   ┴─► one call of each processor ─► p [2, vocab] ─► a draw of a, a draw of c
    row b   repetition penalty               by itself, as it looks at the text

What is done to a row of logits alone gives the same numbers in a batch as by itself, so a token does not depend on who
is drawn for beside it.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_kvopt.batching.rules import Rules

# They look at each row of logits, and at nothing else.
_ROWWISE = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper,
    EpsilonLogitsWarper,
)  # fmt: skip


def draw_alike(rows: Sequence[Rules], logits: Tensor) -> list[int | None]:
    """Draw the next token of each row that samples by the same settings as another one.

    Args:
        rows: how each row's token is chosen.
        logits: [rows, vocab] float32.

    Returns:
        The token of each row; None where it is to be chosen by itself.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, rules in enumerate(rows):
        settings = _settings(rules.processors) if rules.do_sample else None
        if settings is not None:
            groups.setdefault(settings, []).append(i)
    drawn: dict[int, Tensor] = {}
    for group in groups.values():
        if len(group) > 1:
            drawn |= _draw([rows[i] for i in group], group, logits[group])
    chosen: list[int | None] = [None] * len(rows)
    if drawn:
        # The host waits once for all rows.
        for i, token in zip(drawn, torch.cat(list(drawn.values())).tolist(), strict=True):
            chosen[i] = token
    return chosen


def _draw(rows: Sequence[Rules], numbers: Sequence[int], logits: Tensor) -> dict[int, Tensor]:
    """Return the draw [1] of each row by its number; none where it cannot be drawn, which it is told by itself."""
    drawn = {}
    try:
        nothing = torch.empty(len(rows), 0, dtype=torch.long, device=logits.device)
        p = torch.softmax(rows[0].processors(nothing, logits), dim=-1)  # type: ignore[arg-type]
    except Exception:  # of settings that cannot work: each of these requests fails alone
        return {}
    for i, number in enumerate(numbers):
        try:
            drawn[number] = torch.multinomial(p[i], 1, generator=rows[i].generator)
        except RuntimeError:
            continue
    return drawn


def _settings(processors: LogitsProcessorList) -> Hashable | None:
    """Return what is equal for rows whose processors do the same; None where these look at more than logits."""
    if any(type(one) not in _ROWWISE for one in processors):
        return None
    return tuple((type(one), *sorted(vars(one).items())) for one in processors)
