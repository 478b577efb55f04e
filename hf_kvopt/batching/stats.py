"""Counts of what a batcher has done so far, and holds now."""

from collections import deque
from typing import NamedTuple

from hf_kvopt.batching.scheduler import StepPlan

_RECENT = 32  # steps that the rate of tokens is taken over


class BatchStats(NamedTuple):
    """A snapshot of a batcher. Tokens are counted once computed: `computed_tokens` are those that went through the
    model, none of them padding, `new_tokens` those that were generated.
    """

    waiting: int  # requests in the queue
    filling: int  # requests whose prompt is being read
    decoding: int  # requests that decode
    finished: int
    steps: int  # forwards
    computed_tokens: int
    prompt_tokens: int  # of prompts that were looked up
    cached_tokens: int  # of those, found in the prefix store
    new_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_s: float  # generated, over the last steps
    num_blocks: int  # of all block spaces
    used_blocks: int  # held by requests or known texts
    row_blocks: int  # held by requests
    evictions: int
    spilled_blocks: int  # copied to the tiers below the device
    restored_blocks: int  # brought back from there


class Counts:
    """Counts steps; one thread writes."""

    def __init__(self) -> None:
        self.steps = self.computed_tokens = self.new_tokens = self.finished = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._new_before = 0

    def note(self, plan: StepPlan, seconds: float) -> None:
        """Note a forward, whose new tokens were counted."""
        self.steps += 1
        num_new, self._new_before = self.new_tokens - self._new_before, self.new_tokens
        self.computed_tokens += plan.num_tokens
        self._recent.append((num_new, seconds))

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, over the last steps."""
        seconds = sum(taken for _, taken in self._recent)
        return sum(number for number, _ in self._recent) / seconds if seconds else 0.0
