"""How much to draft: whatever is expected to give most tokens a second, by what was measured so far.

A verification of n nodes takes a + b n (fitted), a draft what it took before, and depth k is reached with the product
of the acceptance rates up to k. So a chain of gamma gives 1 + sum_k prod_{j<=k} alpha_j tokens for its time; nothing
drafted gives one for a plain step. Where that wins, speculation stops, is said to have stopped, and is tried again
now and then.
"""

import logging
from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import median

from hf_kvopt.draft.drafter import Plan

logger = logging.getLogger(__name__)

_NOTHING = Plan(0, 0)
_WINDOW = 15  # measurements that are remembered of each kind
_FORGET = 0.98  # acceptance of a step ago counts this much less
_TRUST = 8  # speculative steps before the first judgement
_PAUSE, _LONGEST_PAUSE = 32, 512  # plain steps until speculation is tried again
_CONFIDENCE = (0.02, 0.3, 0.6)  # least, without measurements, most: see `Policy._confidence`


@dataclass
class SpeculationStats:
    """What speculation did so far, over all calls; times in seconds."""

    calls: int = 0
    steps: int = 0  # verifications
    row_steps: int = 0  # verifications times rows
    plain_steps: int = 0  # steps without a draft
    tokens: int = 0  # of verifications, the target's own token of each included
    plain_tokens: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    fell_back: bool = False
    time_saved_s: float = 0.0  # against plain steps for the same tokens, as far as one was timed

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a verification and row, the target's own token included."""
        return self.tokens / self.row_steps if self.row_steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Of the drafts that reached depth k + 1, the share that was accepted up to there."""
        return [a / p if p else 0.0 for a, p in zip(self.accepted_by_depth, self.proposed_by_depth, strict=True)]

    def count_depths(self, proposed: int, accepted: int) -> None:
        """Note one row's draft of depth `proposed`, of which `accepted` tokens were."""
        while len(self.proposed_by_depth) < proposed:
            self.proposed_by_depth.append(0)
            self.accepted_by_depth.append(0)
        for depth in range(proposed):
            self.proposed_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < accepted


class _Rates:
    """Acceptance at each depth, given that the depth before was accepted."""

    def __init__(self) -> None:
        self.tried: list[float] = []
        self.passed: list[float] = []

    def note(self, proposed: int, accepted: int) -> None:
        for depth in range(min(proposed, accepted + 1)):
            if depth == len(self.tried):
                self.tried.append(0.0)
                self.passed.append(0.0)
            self.tried[depth] = self.tried[depth] * _FORGET + 1
            self.passed[depth] = self.passed[depth] * _FORGET + (depth < accepted)

    def expected(self, gamma: int, boost: float = 1.0) -> float:
        """Tokens of a verification of depth gamma; `boost` > 1 where several siblings are tried at each depth."""
        total = reach = 1.0
        for depth in range(gamma):
            reach *= 1 - (1 - self._rate(depth)) ** boost
            total += reach
        return total

    def _rate(self, depth: int) -> float:
        # Before anything is known, one in two; a depth that was never reached is like the one before.
        known = min(depth, len(self.tried) - 1)
        return (self.passed[known] + 1.0) / (self.tried[known] + 2.0) if known >= 0 else 0.5


class Policy:
    """Chooses a plan for each step from acceptance and step times; lives as long as the drafter is used.

    Args:
        gamma: depth of every draft; None chooses up to `max_gamma`.
        num_nodes: tokens of a tree; None chooses, 0 never draws one.
        can_tree: whether the drafter can.
        may_stop: fall back to plain decoding where it is faster.
    """

    def __init__(
        self, gamma: int | None, num_nodes: int | None, top_k: int, max_gamma: int, can_tree: bool, may_stop: bool
    ) -> None:
        chains = [gamma] if gamma is not None else [g for g in (1, 2, 3, 4, 5, 6, 8, 12, 16) if g <= max_gamma]
        self.chains = [Plan(g, g) for g in chains]
        sizes = [] if num_nodes == 0 or not can_tree else [num_nodes] if num_nodes else [8, 12, 16, 24, 32, 48]
        depths = [gamma] if gamma is not None else [g for g in (3, 4, 5, 6, 7) if g <= max_gamma]
        self.trees = [Plan(g, n, top_k) for n in sizes for g in depths if n > g]
        self.tree_is_asked = bool(num_nodes) and bool(self.trees)
        self.may_stop = may_stop
        self.stats = SpeculationStats()
        self.rates: dict[int, _Rates] = defaultdict(_Rates)  # by nodes of the tree; 0: chains
        self.times: dict[tuple, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self.judged = self.pause_left = 0
        self.pause = _PAUSE

    def plan(self, batch_size: int, remaining: int) -> Plan:
        """What to draft now for rows that still take `remaining` tokens each, at most."""
        depth = remaining - 1
        if depth < 1:
            return _NOTHING
        if self.pause_left > 0:
            self.pause_left -= 1
            return _NOTHING
        if self.may_stop and len(self._times("step", batch_size, 1)) < 2:
            return _NOTHING  # what a plain step costs
        plans = [_cut(plan, depth) for plan in self._candidates(batch_size)]
        best = max(plans, key=lambda plan: self._tokens_per_s(plan, batch_size))
        if self.may_stop and self.judged >= _TRUST and self._loses(best, batch_size):
            self._stop(best, batch_size)
            return _NOTHING
        self.judged += 1
        return best._replace(min_confidence=self._confidence(best, batch_size))

    def note_draft(self, plan: Plan, batch_size: int, seconds: float) -> None:
        """A draft by `plan` took `seconds`."""
        self.stats.draft_s += seconds
        self._times("draft", batch_size, _key(plan)).append(seconds)

    def note_step(
        self, plan: Plan, batch_size: int, num_read: int, seconds: float, depths: list[tuple[int, int]], tokens: int
    ) -> None:
        """A forward over `num_read` tokens a row took `seconds`, gave `tokens`; depths: (drafted, accepted) a row."""
        stats = self.stats
        self._times("step", batch_size, num_read).append(seconds)
        if not plan.num_nodes:
            stats.plain_steps += 1
            stats.plain_tokens += tokens
            stats.plain_s += seconds
            return
        stats.steps += 1
        stats.row_steps += len(depths)
        stats.tokens += tokens
        stats.verify_s += seconds
        for proposed, accepted in depths:
            self.rates[0 if plan.is_chain else plan.num_nodes].note(proposed, accepted)
            stats.count_depths(proposed, accepted)
        plain = self._plain_s(batch_size)
        if plain is not None:
            drafted = self._times("draft", batch_size, _key(plan))
            spent = seconds + (drafted[-1] if drafted else 0.0)
            stats.time_saved_s += plain * tokens / max(1, len(depths)) - spent

    def _candidates(self, batch_size: int) -> list[Plan]:
        if batch_size > 1:
            return self.chains
        return self.trees if self.tree_is_asked else self.chains + self.trees

    def _tokens_per_s(self, plan: Plan, batch_size: int) -> float:
        return self._expected(plan) / max(1e-9, self._draft_s(plan, batch_size) + self._step_s(plan, batch_size))

    def _confidence(self, plan: Plan, batch_size: int) -> float:
        """Where a draft should end: one token more must be likelier than the share of a token's time that it costs."""
        least, unknown, most = _CONFIDENCE
        if not self._times("draft", batch_size, _key(plan)):
            return unknown
        deeper = self._draft_s(plan, batch_size) / max(1, plan.gamma)
        slope = (self._step_s(plan, batch_size) - (self._plain_s(batch_size) or 0.0)) / max(1, plan.num_nodes)
        return min(most, max(least, (deeper + max(0.0, slope)) * self._tokens_per_s(plan, batch_size)))

    def _expected(self, plan: Plan) -> float:
        if plan.is_chain:
            return self.rates[0].expected(plan.gamma)
        known = self.rates.get(plan.num_nodes)
        if known is not None and known.tried and known.tried[0] >= 4:
            return known.expected(plan.gamma)
        # A guess until it was tried: two siblings at each depth are worth half a second chance.
        return self.rates[0].expected(plan.gamma, boost=1.5)

    def _draft_s(self, plan: Plan, batch_size: int) -> float:
        known = self._times("draft", batch_size, _key(plan))
        if known:
            return median(known)
        # By depth, as a head drafts depth by depth.
        per_depth = [
            median(times) / max(1, key[2].gamma)
            for key, times in self.times.items() if key[:2] == ("draft", batch_size) and times
        ]  # fmt: skip
        return plan.gamma * median(per_depth) if per_depth else 0.0

    def _step_s(self, plan: Plan, batch_size: int) -> float:
        known = self._times("step", batch_size, plan.num_nodes + 1)
        if len(known) >= 3:
            return median(known)
        points = [
            (key[2], median(times)) for key, times in self.times.items() if key[:2] == ("step", batch_size) and times
        ]
        return _line(points, plan.num_nodes + 1)

    def _plain_s(self, batch_size: int) -> float | None:
        known = self._times("step", batch_size, 1)
        return median(known) if known else None

    def _loses(self, best: Plan, batch_size: int) -> bool:
        plain = self._plain_s(batch_size)
        return plain is not None and self._tokens_per_s(best, batch_size) * plain < 1.0

    def _stop(self, best: Plan, batch_size: int) -> None:
        self.pause_left, self.pause = self.pause, min(2 * self.pause, _LONGEST_PAUSE)
        self.judged = _TRUST - 2
        if not self.stats.fell_back:
            self.stats.fell_back = True
            logger.warning(
                "speculation is slower than plain decoding here: got %.2f tokens a verification, expected at least "
                "%.2f for its cost; going on without drafts, and trying again now and then",
                self._expected(best),
                (self._draft_s(best, batch_size) + self._step_s(best, batch_size)) / (self._plain_s(batch_size) or 1.0),
            )

    def _times(self, kind: str, batch_size: int, what: int | Plan) -> deque[float]:
        return self.times[kind, batch_size, what]


def _key(plan: Plan) -> Plan:
    return plan._replace(min_confidence=0.0)


def _cut(plan: Plan, depth: int) -> Plan:
    """`plan` for rows that can take `depth` drafted tokens at most."""
    if plan.gamma <= depth:
        return plan
    return Plan(depth, depth if plan.is_chain else max(depth, plan.num_nodes), plan.top_k)


def _line(points: list[tuple[int, float]], x: int) -> float:
    """Least squares through `points`, never falling with x."""
    if not points:
        return 1.0
    mean_x = sum(p[0] for p in points) / len(points)
    mean_y = sum(p[1] for p in points) / len(points)
    spread = sum((p[0] - mean_x) ** 2 for p in points)
    slope = max(0.0, sum((p[0] - mean_x) * (p[1] - mean_y) for p in points) / spread) if spread else 0.0
    return max(1e-9, mean_y + slope * (x - mean_x))
