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
_FORGET = 0.9  # weight in a text of the acceptance of one draft earlier
_FORGET_TEXT = 0.995  # weight in all texts
_BELIEF = 2.0  # tries of this text that all texts before count for
_ALIKE = 16.0  # accepted tokens of a prior that all rows are alike: the acceptance of a text changes
_PRIOR = 0.6  # acceptance of a first token before any measurement, with the weight of one try


class Expected(NamedTuple):
    """Expected result of one draft."""

    tokens: float  # tokens that its verification gives, the target's own included
    depth: float  # drafted depth, which may be less than asked for


class Rates:
    """Survival of drafts by depth, given the depth before, and how far they reach.

    A depth that was not tried is taken to be as good as the depth before.
    """

    def __init__(self) -> None:
        self.passed = Memory()  # one more token of a row was drafted and accepted
        self.widths = Memory()  # one more token was drafted for any row

    @property
    def memories(self) -> dict[str, "Memory"]:
        """Return the memories by name, to be kept in a file."""
        return {"passed": self.passed, "widths": self.widths}

    def begin(self) -> None:
        """Begin another text."""
        for memory in self.memories.values():
            memory.recent.clear()

    def note(self, gamma: int, depths: Sequence[tuple[int, int]]) -> None:
        """Note a draft that was asked for depth `gamma`: (drafted, accepted) of each row."""
        for memory in self.memories.values():
            memory.fade()
        self.widths.count(max((drafted for drafted, _ in depths), default=0), gamma)
        for _, accepted in depths:
            # A token that the drafter left out counts as not accepted: it was not confident.
            self.passed.count(accepted, gamma)

    def survival(self, gamma: int) -> list[Expected]:
        """Return what drafts of depth 0 to `gamma` are expected to give."""
        found, tokens, alive, width, depth = [Expected(1.0, 0.0)], 1.0, 1.0, 1.0, 0.0
        pass_rate, width_rate = _PRIOR, 1.0
        for at in range(gamma):
            pass_rate = self.passed.rate(at, pass_rate)
            width_rate = self.widths.rate(at, width_rate)
            alive *= pass_rate
            width *= width_rate
            tokens += alive
            depth += width
            found.append(Expected(tokens, depth))
        return found


class Memory:
    """Counts [times, tries] by depth: of this text, which fade within some ten drafts, and of all texts before.

    The latter are believed as long as this text said little.
    """

    def __init__(self) -> None:
        self.recent: list[list[float]] = []
        self.all: list[list[float]] = []

    def fade(self) -> None:
        """Let older counts weigh less."""
        for counts, factor in ((self.recent, _FORGET), (self.all, _FORGET_TEXT)):
            for count in counts:
                count[0] *= factor
                count[1] *= factor

    def count(self, reached: int, limit: int) -> None:
        """Count one row that reached depth `reached` of at most `limit`."""
        for counts in (self.recent, self.all):
            counts += [[0.0, 0.0] for _ in range(limit - len(counts))]
            for depth in range(min(limit, reached + 1)):
                counts[depth][0] += depth < reached
                counts[depth][1] += 1

    def rate(self, depth: int, before: float) -> float:
        """Return the share of tries that got from `depth` to the next; `before` is that of the depth before."""
        times, tries = self.all[depth] if depth < len(self.all) else (0.0, 0.0)
        usual = (times + before) / (tries + 1.0)
        times, tries = self.recent[depth] if depth < len(self.recent) else (0.0, 0.0)
        return (times + _BELIEF * usual) / (tries + _BELIEF)


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

    The first measurement of a size is dropped: it compiles and loads code. Old measurements of a size expire: they may
    have been taken while something else ran, and would keep that size from being tried again.

    Args:
        growth: assumed relative cost of doubling the size, while only one size was measured.
    """

    def __init__(self, growth: float) -> None:
        self._growth = growth
        self._seconds: dict[int, deque[float]] = defaultdict(_window)
        self._last: dict[int, int] = {}  # number of the last measurement of each size
        self._met: set[int] = set()  # sizes of which the first measurement was dropped
        self._count = 0
        self._line: Line | None = None
        self._medians: dict[int, float] = {}

    def __bool__(self) -> bool:
        return any(self._seconds.values())

    def knows(self, size: int) -> bool:
        """Return whether `size` itself was measured."""
        return bool(self._seconds.get(size))

    def note(self, size: int, seconds: float) -> None:
        """Add one measurement."""
        self._count += 1
        is_old = not self._is_recent(size)
        if size not in self._met:
            self._met.add(size)
            return
        self._last[size] = self._count
        if is_old:
            self._seconds[size].clear()
        self._seconds[size].append(seconds)
        self._medians.pop(size, None)
        self._line = None

    def learn(self, size: int, seconds: float) -> None:
        """Take in what was measured earlier: as good as one measurement."""
        self._last[size] = self._count
        self._seconds[size].append(seconds)
        self._line = None

    def doubt(self) -> None:
        """Keep the last measurement of each size alone: the machine may have been busy, or idle, before."""
        for seconds in self._seconds.values():
            while len(seconds) > 1:
                seconds.popleft()
        self._medians.clear()
        self._line = None

    def medians(self) -> dict[int, float]:
        """Return the median of each size that was measured recently."""
        return {size: self._median(size) for size in self._seconds if self._seconds[size] and self._is_recent(size)}

    def at(self, size: int) -> float:
        """Return the seconds of a size: the median if it was measured, else the value of the line."""
        return self._median(size) if self.knows(size) else self.line().at(size)

    def line(self) -> Line:
        """Fit a line by least squares, with slope and intercept not negative."""
        if self._line is None:
            points = [(size, median, len(self._seconds[size])) for size, median in self.medians().items()]
            if not points:
                return Line(0.0, 0.0)
            self._line = _fit(points) if len(points) > 1 else self._guess(*points[0][:2])
        return self._line

    def _median(self, size: int) -> float:
        if size not in self._medians:
            self._medians[size] = median(self._seconds[size])
        return self._medians[size]

    def _is_recent(self, size: int) -> bool:
        return size in self._last and self._last[size] > self._count - _HORIZON

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


def _window() -> deque[float]:
    return deque(maxlen=_WINDOW)
