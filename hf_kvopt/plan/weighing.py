"""Comparison of options behind a plan, and formatting of its figures: times, ratios, sizes that do not fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hf_kvopt.plan.inputs import show_number
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.options import Holding, Option, Times, holding_of
from hf_kvopt.plan.setup import Setup

# A lossy format must save this share of a request's time, or be needed to fit.
WORTH_A_LOSS = 0.05
MOST_ROWS_TO_DRAFT = 8


class Choice(NamedTuple):
    """One decision in words: the topic, what was chosen, why, the predicted gain, and what was rejected and why."""

    topic: str
    choice: str
    reason: str
    gain: str  # predicted
    rejected: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """Options that were compared, with their figures, and the chosen one."""

    setup: Setup
    layout: Layout
    head: bool  # a draft head is available
    held: Mapping[Option, Holding]  # of options that fit
    misfits: tuple[Option, ...]
    timed: Mapping[Option, Times]  # of options that fit
    default: Times
    best: Option
    largest_batch: int | None

    @property
    def request_s(self) -> float:
        """Predicted seconds of a request with the chosen option."""
        return self.timed[self.best].request_s

    def saving(self, option: Option) -> float:
        """Return the share of the chosen request's time that `option` saves; negative if it takes longer."""
        return 1 - self.timed[option].request_s / self.request_s

    def misfit(self, option: Option) -> int:
        """Return the bytes of the smallest cache of an option that does not fit."""
        return holding_of(self.setup, option, self.setup.batch).most_bytes

    def request_of(self, option: Option) -> str:
        """Compare the time of a request with `option` to the chosen one, in words."""
        return f"{show_number(self.timed[option].request_s)} s a request against {show_number(self.request_s)} s"


def plain(format: str) -> Option:
    """Return the option of a growing cache with nothing else enabled."""
    return Option(format, False, False, "none")


def ms(seconds: float) -> str:
    """Format a time in milliseconds."""
    return f"{show_number(seconds * 1e3)} ms"


def versus(before: float, after: float) -> str:
    """Format `before` and `after` in milliseconds, or seconds if these are many, with their ratio."""
    scale, unit = (1.0, "s") if before >= 10 else (1e3, "ms")
    return f"{show_number(before * scale)} -> {show_number(after * scale)} {unit} ({show_number(before / after)}x)"
