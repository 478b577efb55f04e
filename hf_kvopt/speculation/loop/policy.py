"""Policy: chooses the depth of each draft with the most expected tokens a second, from measurements.

    rate(g) = (1 + sum_{k<=g} S_k) / (T_draft(g) + T_read(rows (1 + g)))        S_k: survival to depth k

over depths g from 0, which is plain decoding. S and T are measured (`costs`) and kept from call to call; in a batch
slower rows count for more (`RelativeAcceptance`). Where depth 0 is best nothing is drafted, and one token now and then
tells whether that has changed. A tree is drawn where the caller asks for one.
"""

import logging
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from hf_kvopt.ranks import follow_first
from hf_kvopt.speculation.drafters.base import Plan
from hf_kvopt.speculation.loop.costs import Rates, RelativeAcceptance, Times
from hf_kvopt.speculation.loop.stats import SpeculationStats

logger = logging.getLogger(__name__)

NOTHING = Plan(0, 0)
_READ_GROWTH = 0.1  # guess until it was measured: twice the tokens take a tenth longer
_PROBE = 16  # plain steps until one token is tried again, doubled each time; at once if all rows accept it
_LONGEST_PROBE = 256
_MOST_SAMPLINGS = 16  # sampling settings with an acceptance of their own
_SAID_AFTER = 8  # drafts before which it is not said that they lose


class Measurements:
    """Measurements under one sampling setting, as a sampled draft is accepted less often than a greedy one."""

    def __init__(self) -> None:
        self.rates = Rates()
        self.draft_times: dict[int, Times] = defaultdict(partial(Times, 1.0))  # by batch size


class Policy:
    """Chooses a plan for each step from acceptance and step times; lives as long as the drafter is used.

    Args:
        gamma: depth of every draft; None chooses up to `max_gamma`.
        num_nodes: tokens of a tree for one row; None or 0 draws chains.
        top_k: children of a node that a tree considers.
        max_gamma: the deepest draft to consider.
        can_tree: the drafter can draft trees.
        may_stop: decode plainly where that is faster.
        max_confidence: see `Drafter`.
    """

    def __init__(
        self,
        gamma: int | None,
        num_nodes: int | None,
        top_k: int,
        max_gamma: int,
        can_tree: bool,
        may_stop: bool,
        max_confidence: float = 1.0,
    ) -> None:
        self.depths = range(1, max_gamma + 1) if gamma is None else range(gamma, gamma + 1)
        self.num_nodes = num_nodes if num_nodes and can_tree and num_nodes > self.depths[0] else 0
        self.top_k, self.may_stop, self.max_confidence = top_k, may_stop, max_confidence
        self.stats = SpeculationStats()
        self.paces = RelativeAcceptance()
        self.read_times = Times(_READ_GROWTH)  # by tokens of all rows
        self.known = Measurements()
        self._known: dict[Hashable, Measurements] = {None: self.known}
        self._num_plain, self._probe = 0, _PROBE  # plain steps since the last draft, and how many there may be

    def begin(self, sampling: Hashable, rows_leave: bool) -> None:
        """Begin a call with these sampling settings; `rows_leave`: finished rows make its steps cheaper."""
        self.known = self._known.pop(sampling) if sampling in self._known else Measurements()
        self._known[sampling] = self.known  # last, as the most recently used
        if len(self._known) > _MOST_SAMPLINGS:
            del self._known[next(iter(self._known))]
        self.known.rates.begin()
        self.paces.begin(rows_leave)
        self._num_plain, self._probe = 0, _PROBE

    def learned(self) -> dict[str, Any]:
        """Return times by size and greedy acceptance by depth, as JSON values."""
        greedy = self._known[None]
        return {
            "read_s": sorted(self.read_times.medians().items()),
            "draft_s": [[batch, sorted(times.medians().items())] for batch, times in greedy.draft_times.items()],
            "rates": {name: memory.all for name, memory in greedy.rates.memories.items()},
        }

    def learn(self, kept: dict[str, Any]) -> None:
        """Take in what another policy learned; nothing of it if any part is not such a value.

        Raises:
            ValueError, TypeError, KeyError: `kept` is not what `learned` returns.
        """
        reads = _times(kept["read_s"])
        drafts = [(int(batch), _times(times)) for batch, times in kept["draft_s"]]
        rates = {name: _counts(kept["rates"][name]) for name in self.known.rates.memories}
        greedy = self._known[None]
        for size, seconds in reads:
            self.read_times.learn(size, seconds)
        for batch, times in drafts:
            for depth, seconds in times:
                greedy.draft_times[batch].learn(depth, seconds)
        for name, memory in greedy.rates.memories.items():
            memory.all = rates[name]

    def plan(self, rows: Sequence[int], remaining: int) -> Plan:
        """Return the plan for `rows`, numbered as in the call, which take at most `remaining` more tokens."""
        if remaining < 2 or (self.may_stop and not self.read_times):
            return NOTHING  # a plain step is measured first
        if 0 < self._num_plain < self._probe:
            self._num_plain += 1  # nothing was learned since: not even choosing is paid for
            return NOTHING
        depth, rate = self._best(rows)
        if depth:
            self._probe = _PROBE
        elif self._num_plain < self._probe:
            self._num_plain += 1
            self._say_once(rows)
            return NOTHING
        else:
            depth, self._probe = self.depths[0], min(2 * self._probe, _LONGEST_PROBE)
            for times in (self.read_times, self._draft_times(len(rows))):
                times.doubt()
        self._num_plain = 0
        depth = min(depth, remaining - 1)
        num_nodes = self.num_nodes if len(rows) == 1 and self.num_nodes > depth else depth
        return Plan(depth, num_nodes, self.top_k if num_nodes > depth else 1, self._least(rows, rate))

    def note_draft(self, batch_size: int, depth: int, seconds: float) -> None:
        """Note that a draft reached `depth` in `seconds`."""
        self.stats.draft_s += seconds
        self.known.draft_times[batch_size].note(depth, seconds)

    def note_step(
        self,
        plan: Plan,  # as asked for
        batch_size: int,
        num_read: int,  # tokens of each row
        draft_s: float | None,  # None: not measured, as the draft also read the prompt
        step_s: float,
        accepted: Mapping[int, tuple[int, int]],  # (drafted, accepted) of each row
        tokens: int,  # tokens gained over all rows
    ) -> None:
        """Note the time and the tokens of a draft and its verification, or of a plain step if the plan is empty."""
        stats, rows, depths = self.stats, max(1, len(accepted)), list(accepted.values())
        self.read_times.note(batch_size * num_read, step_s)
        if plan.num_nodes:
            self.known.rates.note(plan.gamma, depths)
            self.paces.note({row: count for row, (_, count) in accepted.items()})
            if depths and all(count for _, count in depths):
                self._num_plain = self._probe  # should plain decoding seem best again, one more token is tried at once
        if num_read > 1:
            stats.note_verification(depths, tokens, step_s)
        else:
            stats.note_plain(tokens, step_s)
        if plan.num_nodes and draft_s is not None and self.read_times.knows(batch_size):
            stats.time_saved_s += tokens / rows * self.read_times.at(batch_size) - draft_s - step_s

    def rate(self, depth: int, rows: Sequence[int]) -> float:
        """Return the expected tokens of a row a second under drafts of `depth`."""
        return self._rates(rows, depth)[depth]

    def _best(self, rows: Sequence[int]) -> tuple[int, float]:
        """Return the best depth, 0 for plain decoding if that is allowed, and its tokens of a row a second."""
        rates = self._rates(rows, self.depths[-1])
        best = max(self.depths, key=rates.__getitem__)
        if self.may_stop and rates[0] >= rates[best]:
            best = 0
        return best, rates[best]

    def _rates(self, rows: Sequence[int], deepest: int) -> list[float]:
        """Return the expected tokens of a row a second for depths from 0 to `deepest`."""
        batch, read = len(rows), self.read_times
        draft = self._draft_times(batch)
        found = []
        for depth, (tokens, width) in enumerate(self.known.rates.survival(deepest)):
            draft_s = draft.line().at(width) if depth and draft else 0.0
            low = int(width)
            # Between two whole widths, as some drafts are shorter than asked for.
            read_s = read.at(batch * (1 + low)) if read else 1e-3
            if width > low:
                read_s += (width - low) * (read.at(batch * (2 + low)) - read_s)
            seconds = max(1e-9, draft_s + read_s)
            fixed = min(1.0, (draft_s + read.line().base) / seconds)
            found.append(self.paces.counting(rows, tokens, fixed) / seconds)
        return found

    def _least(self, rows: Sequence[int], rate: float) -> float:
        """Return the mean probability that one more column of drafted tokens must have to be worth its time."""
        if not self.may_stop:
            return 0.0  # every step drafts, whatever it costs
        column_s = self._draft_times(len(rows)).line().slope + self.read_times.line().slope * len(rows)
        return min(self.max_confidence, column_s * rate)

    def _draft_times(self, batch_size: int) -> Times:
        """Return the draft times of the nearest measured batch size."""
        known = {batch: times for batch, times in self.known.draft_times.items() if times}
        return known[min(known, key=lambda batch: abs(batch - batch_size))] if known else Times(1.0)

    def _say_once(self, rows: Sequence[int]) -> None:
        if self.stats.fell_back or self.stats.steps < _SAID_AFTER:
            return
        self.stats.fell_back = True
        rates = self._rates(rows, self.depths[-1])
        logger.warning(
            "speculation is slower than plain decoding here: expected %.1f tokens a second and row instead of %.1f; "
            "going on without drafts, and trying one token now and then",
            max(rates[depth] for depth in self.depths),
            rates[0],
        )


def _times(kept: Any) -> list[tuple[int, float]]:
    """Return (size, seconds) pairs as they were kept."""
    times = [(int(size), float(seconds)) for size, seconds in kept]
    if not all(size >= 0 and 0 < seconds < 3600 for size, seconds in times):
        raise ValueError("times must be seconds above 0 by size")
    return times


def _counts(kept: Any) -> list[list[float]]:
    """Return [times, tries] of each depth as they were kept."""
    counts = [[float(times), float(tries)] for times, tries in kept]
    if not all(0 <= times <= tries < 1e9 for times, tries in counts):
        raise ValueError("counts must be [times, tries] by depth")
    return counts


def of_first_rank(model: PreTrainedModel, plan: Plan) -> Plan:
    """Return the plan of the first rank that shares `model`: each measures other times, and all must draft alike.

    Raises:
        CacheStateError: the ranks did not meet in time.
    """
    gamma, num_nodes, top_k, min_confidence = follow_first(model, plan)
    return Plan(int(gamma), int(num_nodes), int(top_k), min_confidence)
