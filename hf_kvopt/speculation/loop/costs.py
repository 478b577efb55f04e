"""Measured gain and cost of drafts: acceptance rate by depth, seconds by size.

A verification takes a + b n seconds for n tokens of all rows together, a draft of depth d takes e + f d. Lines are
fitted to the medians of measurements, so that one size predicts another, and one batch size the next as rows leave.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

_WINDOW = 16  # measurements kept for each size
_HORIZON = 128  # a size counts as recent for this many measurements
_FORGET = 0.98  # weight of the acceptance of one step earlier
_ALIKE = 16.0  # accepted tokens of a prior that all rows are alike: the acceptance of a text changes
_PRIOR = 0.75  # acceptance of a first token before any measurement, with the weight of one try


class Expected(NamedTuple):
    """Expected result of one draft."""

    tokens: float  # tokens that its verification gives, the target's own included
    depth: float  # drafted depth, which may be less than asked for


class Rates:
    """Acceptance by depth, given the depth before: how often the drafter gets there, and how often that is accepted."""

    def __init__(self) -> None:
        self.made: list[list[float]] = []  # [times, tries] of each depth
        self.passed: list[list[float]] = []

    @property
    def num_known(self) -> float:
        """Number of noted drafts, older ones weighted less."""
        return self.passed[0][1] if self.passed else 0.0

    def note(self, gamma: int, depths: list[tuple[int, int]]) -> None:
        """Note a draft that was asked for depth `gamma`: (drafted, accepted) of each row."""
        self.fade(_FORGET)
        missing = gamma - len(self.made)
        for counts in (self.made, self.passed):
            counts += [[0.0, 0.0] for _ in range(missing)]
        for drafted, accepted in depths:
            _count(self.made, drafted, gamma)
            # A token that the drafter left out counts as not accepted: it was not confident.
            _count(self.passed, accepted, gamma)

    def fade(self, factor: float) -> None:
        """Scale down the weight of all counts; the estimate of an untried depth approaches that of the depth before."""
        for counts in (*self.made, *self.passed):
            counts[0] *= factor
            counts[1] *= factor

    def expected(self, gamma: int, boost: float = 1.0) -> Expected:
        """Estimate a draft of depth `gamma`; `boost` > 1 if several siblings are tried at each depth."""
        tokens = passed = made = 1.0
        depth, pass_rate, make_rate = 0.0, _PRIOR, 1.0
        for at in range(gamma):
            if at < len(self.passed):
                pass_rate = _rate(self.passed[at], pass_rate)
                make_rate = _rate(self.made[at], make_rate)
            passed *= pass_rate if boost == 1.0 else 1 - (1 - pass_rate) ** boost
            made *= make_rate
            tokens += passed
            depth += made
        return Expected(tokens, depth)


class RelativeAcceptance:
    """Acceptance of each row of a call relative to the mean: a batch is done when its slowest row is.

    A row that takes e_i tokens a step needs 1/e_i of the steps of plain decoding, and a step takes a + b * rows
    seconds. `counting` returns the tokens a step of a batch of equal rows that would take as long.
    """

    def __init__(self) -> None:
        self._accepted: dict[int, list[float]] = {}  # row: [its accepted tokens, mean over the rows of each step]
        self.rows_leave = True

    def begin(self, rows_leave: bool) -> None:
        """Forget the rows; `rows_leave` tells whether finished rows make the steps of this call cheaper."""
        self._accepted.clear()
        self.rows_leave = rows_leave

    def note(self, accepted: Mapping[int, int]) -> None:
        """Note the drafted tokens that were accepted in one step, by row."""
        mean = sum(accepted.values()) / max(1, len(accepted))
        for row, count in accepted.items():
            own = self._accepted.setdefault(row, [0.0, 0.0])
            own[0] += count
            own[1] += mean

    def counting(self, rows: Sequence[int], tokens: float, fixed: float) -> float:
        """Convert `tokens` a step of the mean row to those of equal rows; `fixed` is the share a of a step's time."""
        if len(rows) == 1:
            return tokens
        steps = [1 / (1 + (tokens - 1) * self._share(row)) for row in rows]
        fixed = fixed if self.rows_leave else 1.0
        return 1 / (fixed * max(steps) + (1 - fixed) * sum(steps) / len(steps))

    def _share(self, row: int) -> float:
        own, mean = self._accepted.get(row, (0.0, 0.0))
        return (own + _ALIKE) / (mean + _ALIKE)


class Line(NamedTuple):
    """Seconds as a linear function of size."""

    base: float
    slope: float

    def at(self, x: float) -> float:
        """Return the seconds of size x."""
        return self.base + self.slope * x


class Times:
    """Measured seconds by size, of one kind of work.

    Old measurements of a size expire: they may have been taken while something else ran, and would keep that size from
    being tried again.

    Args:
        growth: assumed relative cost of doubling the size, while only one size was measured.
    """

    def __init__(self, growth: float) -> None:
        self._growth = growth
        self._seconds: dict[int, deque[float]] = defaultdict(_window)
        self._last: dict[int, int] = {}  # number of the last measurement of each size
        self._count = 0
        self._line: Line | None = None

    def __bool__(self) -> bool:
        return bool(self._seconds)

    @property
    def has_slope(self) -> bool:
        """Return whether more than one size was measured recently."""
        return len(self._recent()) > 1

    def note(self, size: int, seconds: float) -> None:
        """Add one measurement."""
        if size in self._last and not self._is_recent(size):
            self._seconds[size].clear()
        self._seconds[size].append(seconds)
        self._count += 1
        self._last[size] = self._count
        self._line = None

    def at(self, size: int) -> float:
        """Return the seconds of a size: the median if it was measured more than once, else the value of the line."""
        times = self._seconds.get(size, ())
        return median(times) if len(times) > 1 else self.line().at(size)

    def line(self) -> Line:
        """Fit a line by least squares, with slope and intercept not negative."""
        if self._line is None:
            # A size that was measured once may have been slow because it was new.
            recent = self._recent()
            often = {size: times for size, times in recent.items() if len(times) > 1}
            known = often if len(often) > 1 else recent
            points = [(size, median(times), len(times)) for size, times in known.items()]
            self._line = _fit(points) if len(points) > 1 else self._guess(*points[0][:2])
        return self._line

    def _recent(self) -> dict[int, deque[float]]:
        return {size: times for size, times in self._seconds.items() if self._is_recent(size)}

    def _is_recent(self, size: int) -> bool:
        return self._last[size] > self._count - _HORIZON

    def _guess(self, size: int, seconds: float) -> Line:
        return Line(seconds * (1 - self._growth), seconds * self._growth / size) if size else Line(seconds, 0.0)


def _fit(points: list[tuple[int, float, int]]) -> Line:
    weight = sum(count for _, _, count in points)
    mean_x = sum(x * count for x, _, count in points) / weight
    mean_y = sum(y * count for _, y, count in points) / weight
    spread = sum(count * (x - mean_x) ** 2 for x, _, count in points)
    slope = max(0.0, sum(count * (x - mean_x) * (y - mean_y) for x, y, count in points) / spread)
    base = mean_y - slope * mean_x
    return Line(base, slope) if base >= 0 else Line(0.0, mean_y / mean_x)


def _count(counts: list[list[float]], reached: int, gamma: int) -> None:
    for depth in range(min(gamma, reached + 1)):
        counts[depth][0] += depth < reached
        counts[depth][1] += 1


def _rate(count: list[float], before: float) -> float:
    return (count[0] + before) / (count[1] + 1.0)


def _window() -> deque[float]:
    return deque(maxlen=_WINDOW)
