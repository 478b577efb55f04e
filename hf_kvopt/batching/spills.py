"""Spills: rows that give way are copied to the host's memory, where bytes cost less than operations.

    bytes         2 x blocks that lack a copy x bytes of a block / bytes a second       down now, up again later
    operations    tokens of these blocks / tokens a second                              read again instead

The rule of the planner, bytes over bandwidth against operations over rate, with rates that were measured here: the
quickest step that read a prompt, and the copies so far. The first row that gives way is copied to learn the rate.
"""

import time

from hf_kvopt.batching.job import Job
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.prefix.tiers.tiers import Tiers

_WAYS = 2  # down and up


class Spills:
    """Copies preempted rows of one store.

    Args:
        store: with `tiers`.
        tiers: of the store; without memory of the host nothing is copied.
    """

    def __init__(self, store: PrefixStore, tiers: Tiers) -> None:
        self.store, self.tiers = store, tiers
        self.seconds_per_token: float | None = None  # of the quickest step that read a prompt
        self._copied_bytes, self._seconds = 0, 0.0

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Note a step that read prompts, by all tokens that it computed."""
        if num_tokens:
            own = seconds / num_tokens
            self.seconds_per_token = own if self.seconds_per_token is None else min(own, self.seconds_per_token)

    def pays(self, num_blocks: int) -> bool:
        """Tell whether copying so many blocks down and up takes less time than reading their tokens again."""
        if self.seconds_per_token is None or not self._copied_bytes:
            return True
        moved = _WAYS * num_blocks * self.tiers.block_bytes() * self._seconds / self._copied_bytes
        return moved < num_blocks * self.store.block_size * self.seconds_per_token

    def keep(self, job: Job) -> None:
        """Copy what was filed of a job that gave way, where that pays; without the store's lock."""
        if job.key is None:
            return
        with self.store.lock:
            path = self.store.index.match(job.key, job.text).nodes
            missing = sum(map(len, self.tiers.missing_on_host(job.key, path)))
        if not missing or not self.pays(missing):
            return
        started = time.monotonic()
        self._copied_bytes += self.tiers.spiller.keep_on_host(job.key, path)
        self._seconds += time.monotonic() - started
