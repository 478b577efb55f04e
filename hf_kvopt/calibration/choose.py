"""Choose a format by what was measured: the smallest cache within a bound of loss."""

import logging
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hf_kvopt.calibration.measure import calibrate, with_layers
from hf_kvopt.calibration.record import Calibration, stored

logger = logging.getLogger(__name__)

DEFAULT_MAX_LOSS = 0.5  # per cent of perplexity
_MUCH_LOSS = 1.0  # per cent: twice what "auto" allows unasked


class Chosen(NamedTuple):
    """A cache and its options, as `enable` takes them, with one line that says why."""

    cache: str
    options: dict[str, Any]
    said: str


def choose(model: PreTrainedModel, max_loss: float | None = None) -> Chosen:
    """Choose the smallest cache that loses no more than `max_loss` per cent of perplexity on `model`.

    Judged by the upper end of the 95 % interval. Formats of which each layer was measured may keep their most
    sensitive layers native. What was never measured is measured now: see `calibrate`.

    Args:
        max_loss: per cent; 0.5 by default.

    Raises:
        ValueError: max_loss is no number from 0 on.
        KVOptError: nothing was measured, and no tokenizer lies beside the model.
    """
    bound = DEFAULT_MAX_LOSS if max_loss is None else max_loss
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0:
        raise ValueError(f"max_loss must be per cent of perplexity, such as 0.5: got {max_loss!r}")
    measured = stored(model) or calibrate(model)
    fitting = [one for one in _candidates(measured) if one[0] <= bound]
    if not fitting:
        least = min((loss.most_percent for loss in measured.losses.values()), default=float("nan"))
        said = f'hf_kvopt: cache="paged", as no format stays within {bound:g} % (the best loses up to {least:.2g} %)'
        return Chosen("paged", {}, said)
    most, share, name, skipped = min(fitting, key=lambda one: (one[1], one[0]))
    options: dict[str, Any] = {"skip_layers": ("sliding", *skipped)} if skipped else {}
    set_to = f", skip_layers={options['skip_layers']!r}" if skipped else ""
    said = (
        f'hf_kvopt: cache="{name}"{set_to}, {share:.2f} of bfloat16\'s bytes, as it loses at most {most:.2g} % of '
        f"perplexity here (allowed {bound:g} %, measured on {measured.num_tokens:,} tokens)"
    )
    return Chosen(name, options, said)


def _candidates(measured: Calibration) -> list[tuple[float, float, str, tuple[int, ...]]]:
    """Return (per cent lost at most, share of bytes, format, layers left native) of all that may be chosen."""
    found: list[tuple[float, float, str, tuple[int, ...]]] = []
    for name, loss in measured.losses.items():
        found.append((loss.most_percent, loss.bf16_share, name, ()))
        for num_skipped in range(1, len(measured.layers.get(name, ()))):
            expected, skipped = with_layers(measured, name, num_skipped)
            found.append((expected.most_percent, expected.bf16_share, name, skipped))
    return found


def warn_of_loss(model: PreTrainedModel, cache: str) -> None:
    """Say so where `cache` was measured on this very model, and loses much."""
    measured = stored(model)
    loss = measured.losses.get(cache) if measured is not None else None
    if measured is None or loss is None or loss.percent <= _MUCH_LOSS:
        return
    others = {name: other for name, other in measured.losses.items() if other.percent <= DEFAULT_MAX_LOSS}
    smallest = min(others, key=lambda name: others[name].bf16_share, default=None)
    advice = f"; {smallest} loses {others[smallest].percent:.2g} %" if smallest is not None else ""
    logger.warning(
        "%s loses %.2g %% of perplexity on this model (%d tokens, python -m hf_kvopt calibrate)%s; "
        'cache="auto" chooses by it',
        cache,
        loss.percent,
        measured.num_tokens,
        advice,
    )
