"""Policy: chooses the draft size with the most expected tokens a second, from measurements.

A chain of gamma gives 1 + sum_k prod_{j<=k} alpha_j tokens for the time of its draft and its verification, a plain
step gives one; in a batch slower rows count for more (`RelativeAcceptance`). No size is tried for its own sake: sizes
that were not measured recently are read off a line through those that were, a tree is drawn if it promises a clear
gain over chains, and measurements are kept from call to call. Where plain decoding is faster, speculation stops, warns
once, and is tried again later.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import partial
from statistics import median

from transformers import PreTrainedModel

from hf_kvopt.ranks import follow_first
from hf_kvopt.speculation.drafters.base import Plan
from hf_kvopt.speculation.loop.costs import Line, Rates, RelativeAcceptance, Times
from hf_kvopt.speculation.loop.stats import SpeculationStats

logger = logging.getLogger(__name__)

NOTHING = Plan(0, 0)
_CHAINS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_TREES = ((3, 8), (4, 8), (4, 12), (5, 16), (6, 24), (6, 32), (7, 48))  # depth, nodes
_TREE_GAIN = 1.15  # gain over the best chain that a tree must promise before one was measured
_SIBLINGS = 1.3  # guess until a tree was measured: siblings multiply the chances of each depth by this
_READ_GROWTH = 0.1  # guess until it was measured: twice the tokens take a tenth longer
_ENOUGH = 4  # drafts after which a tree size counts as measured
_KEEP = 4  # steps for which a choice stands: choosing costs as much as several small operations
_TRUST, _TRIAL = 16, 8  # speculative steps before the first judgement, and after a pause; texts are uneven
_HELD_UP = 2.0  # longest counted step, in medians: a longer one was delayed from outside
_PAUSE, _LONGEST_PAUSE = 32, 256  # plain steps until speculation is tried again
_MOST_SAMPLINGS = 16  # sampling settings with measurements of their own
_WARM_UP = 3  # steps that are not measured, with drafts and without: the first ones compile and load code
# Least, before measurements, most: see `Policy._confidence`. A head's q is flatter than the target's first choice
# deserves, so costs alone would end drafts too early (measured on the reference model).
_CONFIDENCE = (0.01, 0.03, 0.05)


class Measurements:
    """Measurements under one sampling setting, as a sampled draft is accepted less often than a greedy one."""

    def __init__(self) -> None:
        self.rates: dict[int, Rates] = defaultdict(Rates)  # by nodes of the tree; 0: chains
        self.draft_times: dict[tuple[int, bool], Times] = defaultdict(partial(Times, 1.0))  # (batch, is chain)
        # (tokens of a row, seconds) of the last speculative steps, by batch size
        self.recent: dict[int, deque[tuple[float, float]]] = defaultdict(_recent)
        self.chosen: dict[int, tuple[int, Plan]] = {}  # batch size: (step, plan)
        self.pause_left, self.pause, self.trust = 0, _PAUSE, _TRUST


class Policy:
    """Chooses a plan for each step from acceptance and step times; lives as long as the drafter is used.

    Args:
        gamma: depth of every draft; None chooses up to `max_gamma`.
        num_nodes: tokens of a tree; None chooses, 0 never draws one.
        top_k: children of a node that a tree considers.
        max_gamma: the deepest draft to consider.
        can_tree: the drafter can draft trees.
        may_stop: fall back to plain decoding if it is faster.
    """

    def __init__(
        self, gamma: int | None, num_nodes: int | None, top_k: int, max_gamma: int, can_tree: bool, may_stop: bool
    ) -> None:
        chains = [gamma] if gamma is not None else [g for g in _CHAINS if g <= max_gamma]
        self.chains = [Plan(g, g) for g in chains]
        shapes = _TREES if num_nodes is None else [(g, num_nodes) for g in range(2, max_gamma + 1)]
        if gamma is not None:
            shapes = [(gamma, n) for n in ([num_nodes] if num_nodes else sorted({n for _, n in _TREES}))]
        is_wanted = can_tree and num_nodes != 0
        self.trees = [Plan(g, n, top_k) for g, n in shapes if is_wanted and g < n and g <= (gamma or max_gamma)]
        self.tree_is_asked = bool(num_nodes) and bool(self.trees)
        self.may_stop = may_stop
        self.stats = SpeculationStats()
        self.paces = RelativeAcceptance()
        self.read_times = Times(_READ_GROWTH)  # by tokens of all rows
        self.num_steps = self.num_drafted = self.num_plain = 0
        self.known = Measurements()
        self._known: dict[Hashable, Measurements] = {None: self.known}

    def begin(self, sampling: Hashable, rows_leave: bool) -> None:
        """Begin a call with these sampling settings; `rows_leave`: finished rows make its steps cheaper."""
        self.known = self._known.pop(sampling) if sampling in self._known else Measurements()
        self._known[sampling] = self.known  # last, as the most recently used
        if len(self._known) > _MOST_SAMPLINGS:
            del self._known[next(iter(self._known))]
        self.paces.begin(rows_leave)

    def plan(self, rows: Sequence[int], remaining: int) -> Plan:
        """Return the plan for `rows`, numbered as in the call, which take at most `remaining` more tokens."""
        batch_size = len(rows)
        if remaining < 2:
            return NOTHING
        if self.known.pause_left > 0:
            self.known.pause_left -= 1
            return NOTHING
        if self.may_stop and self.num_plain < 2:
            return NOTHING  # measure a plain step first
        if self.may_stop and self._loses(rows):
            self._stop(rows)
            return NOTHING
        step, best = self.known.chosen.get(batch_size, (-_KEEP, NOTHING))
        if self.num_steps >= step + _KEEP:
            best = self._best(rows)
            self.known.chosen[batch_size] = self.num_steps, best
        return _cut(best, remaining - 1)

    def note_draft(self, plan: Plan, batch_size: int, depth: int, seconds: float, is_first: bool = False) -> None:
        """Note that a draft by `plan` reached `depth` in `seconds`; the first of a call also reads the prompt."""
        self.stats.draft_s += seconds
        if not is_first and self.num_drafted >= _WARM_UP:
            self.known.draft_times[batch_size, plan.is_chain].note(depth, seconds)

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
        self.num_steps += 1
        self.num_drafted += bool(plan.num_nodes)
        if (self.num_drafted if plan.num_nodes else self.num_steps) > _WARM_UP:
            self.read_times.note(batch_size * num_read, step_s)
            self.num_plain += num_read == 1
            if plan.num_nodes and draft_s is not None:
                self.known.recent[batch_size].append((tokens / rows, draft_s + step_s))
        if plan.num_nodes:
            self.known.rates[0 if plan.is_chain else plan.num_nodes].note(plan.gamma, depths)
            self.paces.note({row: count for row, (_, count) in accepted.items()})
        if num_read > 1:
            stats.note_verification(depths, tokens, step_s)
        else:
            stats.note_plain(tokens, step_s)
        if plan.num_nodes and draft_s is not None and self.num_plain:
            stats.time_saved_s += tokens / rows / self._plain_rate(batch_size) - draft_s - step_s

    def rate(self, plan: Plan, rows: Sequence[int]) -> float:
        """Return the expected tokens of a row a second under a plan that drafts."""
        batch_size = len(rows)
        read = self.read_times.line() if self.read_times else Line(1e-3, 0.0)
        tokens, depth = self._rates_of(plan).expected(plan.gamma, 1.0 if self._is_known(plan) else _SIBLINGS)
        num_read = 1 + (depth if plan.is_chain else plan.num_nodes)
        draft_s = self._draft_line(plan.is_chain, batch_size).at(depth)
        seconds = draft_s + read.at(batch_size * num_read)
        return self.paces.counting(rows, tokens, (draft_s + read.base) / max(1e-9, seconds)) / max(1e-9, seconds)

    def _plain_rate(self, batch_size: int) -> float:
        return 1 / self.read_times.at(batch_size) if self.read_times else 1e3

    def _best(self, rows: Sequence[int]) -> Plan:
        chains = [] if self.tree_is_asked and len(rows) == 1 else self.chains
        best = max(chains, key=lambda plan: self.rate(plan, rows), default=None)
        if len(rows) == 1 and self.trees and (best is None or self.known.draft_times[1, True].has_slope):
            tree = max(self.trees, key=lambda plan: self.rate(plan, rows))
            gain = 1.0 if self._is_known(tree) else _TREE_GAIN
            if best is None or self.rate(tree, rows) > gain * self.rate(best, rows):
                best = tree
        assert best is not None
        return best._replace(min_confidence=self._confidence(best, rows))

    def _is_known(self, plan: Plan) -> bool:
        return plan.is_chain or self.known.rates[plan.num_nodes].num_known >= _ENOUGH

    def _rates_of(self, plan: Plan) -> Rates:
        return self.known.rates[0 if plan.is_chain or not self._is_known(plan) else plan.num_nodes]

    def _confidence(self, plan: Plan, rows: Sequence[int]) -> float:
        """Return the joint probability below which a draft ends: the cost of one more token in token times."""
        (least, unknown, most), batch_size = _CONFIDENCE, len(rows)
        if not self.known.draft_times[batch_size, plan.is_chain].has_slope:
            return unknown
        deeper = self._draft_line(plan.is_chain, batch_size).slope * plan.gamma / plan.num_nodes
        cost = deeper + self.read_times.line().slope * batch_size
        return min(most, max(least, cost * self.rate(plan, rows)))

    def _draft_line(self, is_chain: bool, batch_size: int) -> Line:
        """Return the draft times of the nearest measured batch size; an unmeasured tree is guessed from chains."""
        known = {batch: times for (batch, kind), times in self.known.draft_times.items() if kind == is_chain and times}
        if known:
            return known[min(known, key=lambda batch: abs(batch - batch_size))].line()
        if is_chain or not any(kind and times for (_, kind), times in self.known.draft_times.items()):
            return Line(0.0, 0.0)
        # A level of a tree has several nodes: guess twice the time of a level of a chain.
        base, slope = self._draft_line(True, batch_size)
        return Line(base, 2 * slope)

    def _loses(self, rows: Sequence[int]) -> bool:
        """Return whether the last speculative steps gave fewer tokens a second, as counted, than plain ones."""
        num_steps = len(self.known.recent[len(rows)])
        if num_steps < self.known.trust:
            return False
        loses = self._counted_rate(rows) < self._plain_rate(len(rows))
        if not loses and num_steps == _TRUST:
            self.known.pause, self.known.trust = _PAUSE, _TRUST
        return loses

    def _counted_rate(self, rows: Sequence[int]) -> float:
        """Return the tokens of a row a second in the last speculative steps, weighted by `RelativeAcceptance`."""
        steps = self.known.recent[len(rows)]
        if not steps:
            return 0.0
        tokens, seconds = sum(tokens for tokens, _ in steps) / len(steps), median([seconds for _, seconds in steps])
        counting = self.paces.counting(rows, tokens, min(1.0, self.read_times.line().base / seconds))
        return _rate_of(steps) * counting / tokens

    def _stop(self, rows: Sequence[int]) -> None:
        if not self.stats.fell_back:
            self.stats.fell_back = True
            logger.warning(
                "speculation is slower than plain decoding here: got %.1f tokens a second and row instead of %.1f; "
                "going on without drafts, and trying again now and then",
                self._counted_rate(rows),
                self._plain_rate(len(rows)),
            )
        self.known.pause_left, self.known.pause = self.known.pause, min(2 * self.known.pause, _LONGEST_PAUSE)
        # Make sure that speculation is tried again, and judged by its new measurements.
        self.known.trust = _TRIAL
        self.known.recent.clear()
        self.known.chosen.clear()
        for rates in self.known.rates.values():
            rates.fade(1 / 8)


def of_first_rank(model: PreTrainedModel, plan: Plan) -> Plan:
    """Return the plan of the first rank that shares `model`: each measures other times, and all must draft alike.

    Raises:
        CacheStateError: the ranks did not meet in time.
    """
    gamma, num_nodes, top_k, min_confidence = follow_first(model, plan)
    return Plan(int(gamma), int(num_nodes), int(top_k), min_confidence)


def _recent() -> deque[tuple[float, float]]:
    return deque(maxlen=_TRUST)


def _rate_of(steps: Collection[tuple[float, float]]) -> float:
    """Return tokens a second; a step that was delayed from outside counts for at most `_HELD_UP` medians."""
    longest = _HELD_UP * median([seconds for _, seconds in steps]) if steps else 0.0
    return sum(tokens for tokens, _ in steps) / max(1e-9, sum(min(seconds, longest) for _, seconds in steps))


def _cut(plan: Plan, depth: int) -> Plan:
    """Limit `plan` to rows that can take at most `depth` drafted tokens."""
    if plan.gamma <= depth:
        return plan
    num_nodes = depth if plan.is_chain else max(depth, plan.num_nodes)
    return plan._replace(gamma=depth, num_nodes=num_nodes)
