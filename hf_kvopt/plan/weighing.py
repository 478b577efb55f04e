"""What a plan is chosen from, and how its figures are said: times, ratios, sizes of what does not fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hf_kvopt.plan.inputs import show_number
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.options import Holding, Option, Times, holding_of
from hf_kvopt.plan.setup import Setup

# A format must save this share of a request's time, or be needed to fit: its loss is not zero.
WORTH_A_LOSS = 0.05
MOST_ROWS_TO_DRAFT = 8


class Choice(NamedTuple):
    """One decision in words: what about, what was chosen, why, what it should gain, and what was not chosen and why."""

    topic: str
    choice: str
    reason: str
    gain: str  # predicted
    rejected: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What a plan was chosen from, and what was chosen."""

    setup: Setup
    layout: Layout
    head: bool  # a draft head is at hand
    held: Mapping[Option, Holding]  # of what fits
    misfits: tuple[Option, ...]
    timed: Mapping[Option, Times]  # of what fits
    default: Times
    best: Option
    largest_batch: int | None

    @property
    def request_s(self) -> float:
        """Seconds of a request by the choice."""
        return self.timed[self.best].request_s

    def saving(self, option: Option) -> float:
        """Return the share of the chosen request's time that `option` saves; below 0 where it takes longer."""
        return 1 - self.timed[option].request_s / self.request_s

    def misfit(self, option: Option) -> int:
        """Return the bytes of the smallest cache of an option that does not fit."""
        return holding_of(self.setup, option, self.setup.batch).most_bytes

    def request_of(self, option: Option) -> str:
        """Say what a request by `option` takes against one by the choice."""
        return f"{show_number(self.timed[option].request_s)} s a request against {show_number(self.request_s)} s"


def plain(format: str) -> Option:
    """Return the option of a growing cache, and nothing else."""
    return Option(format, False, False, "none")


def ms(seconds: float) -> str:
    """Write a time in milliseconds."""
    return f"{show_number(seconds * 1e3)} ms"


def versus(before: float, after: float) -> str:
    """Write `before` to `after` in milliseconds, or seconds where these are many, with the ratio."""
    scale, unit = (1.0, "s") if before >= 10 else (1e3, "ms")
    return f"{show_number(before * scale)} -> {show_number(after * scale)} {unit} ({show_number(before / after)}x)"
