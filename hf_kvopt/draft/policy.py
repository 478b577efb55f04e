"""How much to draft: whatever is expected to give most tokens a second, by what was measured so far.

A verification of n nodes takes a + b n and a draft of depth d takes e + f d, both fitted to measured steps; depth k is
reached with the product of the acceptance rates up to k. So a chain of gamma gives 1 + sum_k prod_{j<=k} alpha_j
tokens for its time, and nothing drafted gives one for a plain step. A plan that was used is judged by the tokens and
seconds that it really had. Where plain decoding wins, speculation stops, says so once, and is tried again later.
"""

import logging
from collections import defaultdict, deque
from statistics import median
from typing import NamedTuple

from hf_kvopt.draft.drafter import Plan
from hf_kvopt.draft.stats import SpeculationStats

logger = logging.getLogger(__name__)

NOTHING = Plan(0, 0)
_CHAINS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_TREES = ((3, 8), (4, 8), (4, 12), (5, 16), (6, 24), (6, 32), (7, 48))  # depth, nodes
_WINDOW = 16  # measurements that are remembered of each kind
_FORGET = 0.98  # acceptance of a step ago counts this much less
_ENOUGH = 4  # uses after which a plan is judged by what it gave
_STALE = 64  # steps after which what a plan gave says nothing any more
_PROBE = 10  # every so many steps the next deeper chain is tried: text changes, and only trying tells
_TRUST = 8  # speculative steps before the first judgement
_PAUSE, _LONGEST_PAUSE = 32, 256  # plain steps until speculation is tried again
_WARM_UP = 3  # steps that are not measured: the first ones compile and load things
# Least, without measurements, most: see `Policy._confidence`. A head's q is spread wider than the target's first choice
# deserves, so costs alone would end drafts too early (measured on the reference model).
_CONFIDENCE = (0.01, 0.05, 0.1)


class Yield(NamedTuple):
    """What one draft and its verification gave and took."""

    step: int  # when
    tokens: float  # of a row, on average
    seconds: float


class _Rates:
    """Acceptance at each depth of a plan, given that the depth before was accepted."""

    def __init__(self) -> None:
        self.tried: list[float] = []
        self.passed: list[float] = []

    def note(self, gamma: int, accepted: int) -> None:
        """A row's draft by a plan of depth gamma; depths that the drafter left out count as not accepted."""
        for depth in range(min(gamma, accepted + 1)):
            if depth == len(self.tried):
                self.tried.append(0.0)
                self.passed.append(0.0)
            self.tried[depth] = self.tried[depth] * _FORGET + 1
            self.passed[depth] = self.passed[depth] * _FORGET + (depth < accepted)

    def fade(self) -> None:
        """Let what was seen so far count for little."""
        self.tried, self.passed = ([x / 8 for x in values] for values in (self.tried, self.passed))

    def expected(self, gamma: int, boost: float = 1.0) -> float:
        """Tokens of a verification of depth gamma; `boost` > 1 where several siblings are tried at each depth."""
        total = reach = 1.0
        for depth in range(gamma):
            reach *= 1 - (1 - self._rate(depth)) ** boost
            total += reach
        return total

    def _rate(self, depth: int) -> float:
        # Before anything is known, three in four; a depth that was never reached is like the one before.
        known = min(depth, len(self.tried) - 1)
        return (self.passed[known] + 0.75) / (self.tried[known] + 1.0) if known >= 0 else 0.75


class Policy:
    """Chooses a plan for each step from acceptance and step times; lives as long as the drafter is used.

    Args:
        gamma: depth of every draft; None chooses up to `max_gamma`.
        num_nodes: tokens of a tree; None chooses, 0 never draws one.
        top_k: children of a node that a tree considers.
        max_gamma: the deepest draft to consider.
        can_tree: whether the drafter can.
        may_stop: fall back to plain decoding where it is faster.
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
        self.rates: dict[int, _Rates] = defaultdict(_Rates)  # by nodes of the tree; 0: chains
        self.step_s: dict[tuple[int, int], deque[float]] = defaultdict(_window)  # (batch, tokens read a row)
        self.draft_s: dict[tuple[int, bool, int], deque[float]] = defaultdict(_window)  # (batch, is chain, depth)
        self.yields: dict[tuple[int, Plan], deque[Yield]] = defaultdict(_window)
        self.judged = self.pause_left = self.num_steps = 0
        self.pause = _PAUSE

    def plan(self, batch_size: int, remaining: int) -> Plan:
        """What to draft now for rows that still take `remaining` tokens each, at most."""
        depth = remaining - 1
        if depth < 1:
            return NOTHING
        if self.pause_left > 0:
            self.pause_left -= 1
            return NOTHING
        if self.may_stop and self.num_plain < 2:
            return NOTHING  # what a plain step costs
        candidates = self.chains if batch_size > 1 else self.trees if self.tree_is_asked else self.chains + self.trees
        best = max((_cut(plan, depth) for plan in candidates), key=lambda plan: self.rate(plan, batch_size))
        if self.may_stop and self.judged >= _TRUST and self.rate(best, batch_size) < self.rate(NOTHING, batch_size):
            self._stop(best, batch_size)
            return NOTHING
        self.judged += 1
        if self.judged % _PROBE == 0 and best.is_chain:
            best = min((_cut(p, depth) for p in self.chains if p.gamma > best.gamma), default=best)
        return best._replace(min_confidence=self._confidence(best, batch_size))

    @property
    def num_plain(self) -> int:
        """Plain steps that were measured and are remembered, at whatever batch size."""
        return sum(len(times) for (_, num_read), times in self.step_s.items() if num_read == 1)

    def note_draft(self, plan: Plan, batch_size: int, depth: int, seconds: float, is_first: bool = False) -> None:
        """A draft by `plan` that came to `depth` took `seconds`; the first of a call takes in the prompt as well."""
        self.stats.draft_s += seconds
        if not is_first and self.num_steps >= _WARM_UP:
            self.draft_s[batch_size, plan.is_chain, depth].append(seconds)

    def note_step(
        self,
        plan: Plan,  # as it was asked for
        batch_size: int,
        num_read: int,  # tokens of each row
        draft_s: float | None,  # None: not a measure, as the draft took in the prompt
        step_s: float,
        depths: list[tuple[int, int]],  # (drafted, accepted) of each row
        tokens: int,  # that came of it, over all rows
    ) -> None:
        """Note what a draft and its verification took and gave; a plain step where nothing was asked for."""
        stats, rows = self.stats, max(1, len(depths))
        self.num_steps += 1
        if self.num_steps > _WARM_UP:
            self.step_s[batch_size, num_read].append(step_s)
            if plan.num_nodes and draft_s is not None:
                self.yields[batch_size, _key(plan)].append(Yield(self.num_steps, tokens / rows, draft_s + step_s))
        if plan.num_nodes:
            for _, accepted in depths:
                self.rates[0 if plan.is_chain else plan.num_nodes].note(plan.gamma, accepted)
        if num_read > 1:
            stats.note_verification(depths, tokens, step_s)
        else:
            stats.note_plain(tokens, step_s)
        if plan.num_nodes and draft_s is not None and self.num_plain:
            stats.time_saved_s += self._step_time(1, batch_size) * tokens / rows - draft_s - step_s

    def rate(self, plan: Plan, batch_size: int) -> float:
        """Tokens of a row a second."""
        if not plan.num_nodes:
            return 1 / self._step_time(1, batch_size)
        known = self.yields[batch_size, _key(plan)]
        while known and known[0].step < self.num_steps - _STALE:
            known.popleft()
        if len(known) >= _ENOUGH:
            return sum(x.tokens for x in known) / sum(x.seconds for x in known)
        seconds = self._draft_time(plan, batch_size) + self._step_time(plan.num_nodes + 1, batch_size)
        return self._expected(plan) / seconds

    def _confidence(self, plan: Plan, batch_size: int) -> float:
        """Where a draft should end: one token more must be likelier than the share of a token's time that it costs."""
        least, unknown, most = _CONFIDENCE
        drafts = self._points(batch_size, plan.is_chain)
        if len(drafts) < 2:
            return unknown
        deeper = _line(drafts, 2) - _line(drafts, 1)
        wider = self._step_time(plan.num_nodes + 1, batch_size) - self._step_time(1, batch_size)
        cost = deeper + max(0.0, wider) / plan.num_nodes
        return min(most, max(least, cost * self.rate(plan, batch_size)))

    def _expected(self, plan: Plan) -> float:
        if plan.is_chain:
            return self.rates[0].expected(plan.gamma)
        known = self.rates.get(plan.num_nodes)
        if known is not None and known.tried and known.tried[0] >= _ENOUGH:
            return known.expected(plan.gamma)
        # A guess until it was tried: siblings at each depth are worth a third of a second chance.
        return self.rates[0].expected(plan.gamma, boost=1.3)

    def _points(self, batch_size: int, is_chain: bool) -> list[tuple[int, float]]:
        """(depth, seconds) of the drafts of a kind."""
        return [
            (depth, median(times))
            for (batch, kind, depth), times in self.draft_s.items() if (batch, kind) == (batch_size, is_chain)
        ]  # fmt: skip

    def _draft_time(self, plan: Plan, batch_size: int) -> float:
        points = self._points(batch_size, plan.is_chain)
        if not points:
            # A level of a tree is several nodes: as if it took twice as long as one of a chain.
            factor = 0.5 if plan.is_chain else 2.0
            points = [(depth, seconds * factor) for depth, seconds in self._points(batch_size, not plan.is_chain)]
        if not points and self.draft_s:
            points = self._points(min(self.draft_s, key=lambda key: abs(key[0] - batch_size))[0], plan.is_chain)
        if len(points) == 1:
            # As if the whole of it were the depth's.
            return points[0][1] * plan.gamma / max(1, points[0][0])
        return _line(points, plan.gamma) if points else 0.0

    def _step_time(self, num_read: int, batch_size: int) -> float:
        known = self.step_s.get((batch_size, num_read), ())
        if len(known) >= _ENOUGH or (known and num_read == 1):
            return median(known)
        # By the tokens of all rows, as batches of any size tell what those cost.
        points = [(batch * n, median(times)) for (batch, n), times in self.step_s.items() if times]
        return _line(points, batch_size * num_read) if points else 1e-3

    def _stop(self, best: Plan, batch_size: int) -> None:
        if not self.stats.fell_back:
            self.stats.fell_back = True
            logger.warning(
                "speculation is slower than plain decoding here: got %.1f tokens a second and row instead of %.1f; "
                "going on without drafts, and trying again now and then",
                self.rate(best, batch_size),
                self.rate(NOTHING, batch_size),
            )
        self.pause_left, self.pause = self.pause, min(2 * self.pause, _LONGEST_PAUSE)
        self.judged = _TRUST - _ENOUGH
        # So that it is really tried again, and what it gives then counts.
        for key in [key for key in self.yields if key[0] == batch_size]:
            self.yields[key].clear()
        for rates in self.rates.values():
            rates.fade()


def _window() -> deque:
    return deque(maxlen=_WINDOW)


def _key(plan: Plan) -> Plan:
    return plan._replace(min_confidence=0.0)


def _cut(plan: Plan, depth: int) -> Plan:
    """`plan` for rows that can take `depth` drafted tokens at most."""
    if plan.gamma <= depth:
        return plan
    return Plan(depth, depth if plan.is_chain else max(depth, plan.num_nodes), plan.top_k)


def _line(points: list[tuple[int, float]], x: int) -> float:
    """Least squares through `points`, never falling with x."""
    mean_x = sum(p[0] for p in points) / len(points)
    mean_y = sum(p[1] for p in points) / len(points)
    spread = sum((p[0] - mean_x) ** 2 for p in points)
    slope = max(0.0, sum((p[0] - mean_x) * (p[1] - mean_y) for p in points) / spread) if spread else 0.0
    return max(1e-9, mean_y + slope * (x - mean_x))
