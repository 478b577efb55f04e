"""Scheduler: which jobs take part in the next forward, so that it cannot run out of blocks half way.

    waiting   [f] [g] [h]        admitted in order, as rows and blocks allow
    arriving  [i]                                    with tiers: known blocks of its text are copied to the device
    filling   [d: 300 of 812]    [e: 0 of 40]        share the tokens of a step that decoding leaves them
    decoding  [a] [b] [c]        one token each, and what is drafted behind it

What is needed is counted over all of them before a step. Where it is too much, the job that came last gives way,
filling or decoding: its blocks stay with the known texts as long as there is room, and it goes on from what is left of
them. The job that came first therefore always goes on, and is alone in the end with all blocks: no job starves.
"""

import bisect
from collections.abc import Hashable
from typing import NamedTuple

from hf_kvopt.batching.job import Job
from hf_kvopt.batching.returns import Returns
from hf_kvopt.batching.room import Blocks, Room, total
from hf_kvopt.batching.rows import Rows
from hf_kvopt.batching.spills import Spills
from hf_kvopt.prefix.filing import file_row, open_row
from hf_kvopt.prefix.index import Match
from hf_kvopt.prefix.store import PrefixStore

Key = tuple[Hashable, Hashable]
"""What texts are filed under: see `PrefixStore.key_of`."""


_MOMENT = 0.01  # seconds: new requests come in between


class Portion(NamedTuple):
    """Tokens of a prompt that one step reads."""

    job: Job
    num_tokens: int


class StepPlan(NamedTuple):
    """Drafts and portions of prompts that one forward computes."""

    drafts: list[list[int]]  # tokens to try behind the last one of each decoding row
    portions: list[Portion]

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to compute."""
        return not (self.drafts or self.portions)

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward computes."""
        return sum(1 + len(draft) for draft in self.drafts) + sum(number for _, number in self.portions)


class Scheduler:
    """Owns the queue and the jobs that are being filled; the decoding ones are those of `rows`.

    Args:
        store: where texts are known, and whose blocks are counted.
        rows: the decoding rows.
        max_rows: jobs that are filled or decode at a time.
        prefill_chunk: prompt tokens of one step.
        shares: whether texts are filed and found again.
    """

    def __init__(self, store: PrefixStore, rows: Rows, max_rows: int, prefill_chunk: int, shares: bool = True) -> None:
        self.store, self.rows, self.room = store, rows, Room(store)
        self.max_rows, self.prefill_chunk, self.shares = max_rows, prefill_chunk, shares
        self.waiting: list[Job] = []  # by rank
        self.filling: list[Job] = []  # by rank
        self.num_preempted = 0
        tiers = store.blocks.tiers
        self.returns = None if tiers is None else Returns(store, tiers)
        self.spills = None if tiers is None else Spills(store, tiers)
        self._keys: dict[Hashable, Key | None] = {}  # by namespace, of this moment: to look at a model takes a while

    @property
    def is_idle(self) -> bool:
        """Tell whether no job is left."""
        return not self.jobs

    @property
    def jobs(self) -> list[Job]:
        """All jobs, in no order."""
        return [*self.waiting, *self.arriving, *self.filling, *self.rows.jobs]

    @property
    def arriving(self) -> list[Job]:
        """Jobs whose known blocks are on their way to the device."""
        return [] if self.returns is None else self.returns.arriving

    def add(self, job: Job) -> None:
        """Queue a job."""
        bisect.insort(self.waiting, job, key=_rank)

    def plan(self, drafts: list[list[int]]) -> StepPlan:
        """Choose the next forward, admitting and preempting as blocks allow; nothing is left to do where it is empty.

        Args:
            drafts: what could be tried behind each decoding row; nothing is where room is short.
        """
        self._land()
        with self.store.lock:
            drafts, gone = self._make_way(drafts)
        if self.spills is not None:
            for job in gone:
                self.spills.keep(job)
        with self.store.lock:
            self._admit(_longest(drafts))
            portions = self._portions(_longest(drafts))
            self.room.take(self._needed(_longest(drafts), portions))
            return StepPlan(drafts, portions)

    def wait(self) -> bool:
        """Wait a moment for what comes back from the tiers; returns whether anything does."""
        if self.returns is None or not (self.returns.is_looking or self.arriving):
            return False
        self.returns.wait(_MOMENT)
        return True

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Note how long a step took, for the rule by which rows that give way are copied."""
        if self.spills is not None and plan.portions:
            self.spills.note_step(plan.num_tokens, seconds)

    def close(self) -> None:
        """Forget all jobs, none of which has a cache any more, and end the threads."""
        self.waiting, self.filling = [], []
        if self.returns is not None:
            self.returns.close()

    def _make_way(self, drafts: list[list[int]]) -> tuple[list[list[int]], list[Job]]:
        """Let jobs give way until a step can be computed; returns the drafts of rows that stay, and these jobs."""
        gone: list[Job] = []
        if not self.room.has(self._decoding(_longest(drafts))):
            drafts = [[] for _ in drafts]
        while not self.room.has(self._decoding(_longest(drafts))):
            place = self._preempt_newest(gone)
            drafts = [draft for row, draft in enumerate(drafts) if row != place]
        # Half filled prompts may hold all blocks, so that none of them can go on.
        while self._is_stuck():
            self._preempt_newest(gone)
        return drafts, gone

    def _is_stuck(self) -> bool:
        return bool(self.filling) and not self.rows.jobs and not self._portions(0)

    def _land(self) -> None:
        """Let jobs fill whose known blocks are there; where room is short, all that are on their way."""
        if self.returns is None:
            return
        self.returns.is_looking = False
        with self.store.lock:
            is_short = not self.room.has(self._decoding(0)) or self._is_stuck()
        if is_short:
            self.returns.wait()
        with self.store.lock:
            for job in self.returns.landed():
                if job.is_done:
                    self.add(job)
                else:
                    self._open(job, self._key_of(job))
                self.returns.leave(job)

    def file(self, job: Job) -> None:
        """Let others find the whole blocks that a filling job holds of its text."""
        if self.shares and job.cache is not None and job.cache.num_rows:
            held = job.num_held - job.num_held % self.store.block_size
            file_row(self.store, job.key, self._key_of(job), job.text[:held], job.cache, 0)

    def file_rows(self, leaving: list[int]) -> None:
        """Let others find all that leaving rows hold of their texts."""
        for row in leaving if self.shares else ():
            job = self.rows.jobs[row]
            file_row(self.store, job.key, self._key_of(job), job.text[: self.rows.lengths[row]], self.rows.cache, row)

    def _decoding(self, num_drafted: int) -> Blocks:
        """Blocks that the decoding rows take in a step, `num_drafted` tokens being tried behind each at most."""
        if not self.rows.jobs:
            return total([], len(self.store.allocators))
        return self.room.needed(self.rows.cache, 1 + num_drafted)

    def _needed(self, num_drafted: int, portions: list[Portion]) -> Blocks:
        filling = [self.room.needed(job.cache, number) for job, number in portions if job.cache is not None]
        return total([self._decoding(num_drafted), *filling], len(self.store.allocators))

    def _preempt_newest(self, gone: list[Job]) -> int | None:
        """Let the job that came last give way, and add it to `gone`; returns its row where it was decoding."""
        newest = max([*self.filling, *self.rows.jobs], key=_rank)
        self.num_preempted += 1
        newest.request.preemptions += 1
        place = None
        if newest in self.filling:
            self.file(newest)
            self.filling.remove(newest)
            newest.close()
        else:
            place = self.rows.jobs.index(newest)
            self.file_rows([place])
            self.rows.leave([place])
        self.add(newest)
        gone.append(newest)
        return place

    def _admit(self, num_drafted: int) -> None:
        """Begin to fill waiting jobs, in their order, while there are rows and blocks for the whole of their texts.

        A job waits for one that is being filled where both begin alike, as it will find those blocks then; jobs behind
        it may go first, until that prompt is filled. As many are looked at as there are rows, however long the queue.
        """
        promised = [self._decoding(num_drafted), *(self._rest(job) for job in self.filling)]
        promised += [self._rest_of_arriving(job) for job in self.arriving]
        num_taken = len(self.filling) + len(self.rows.jobs) + len(self.arriving)
        for job in self.waiting[: self.max_rows]:
            if num_taken >= self.max_rows:
                return
            key = self._key_of(job)
            match = self.store.index.match(key, job.text[:-1]) if key is not None else Match([], 0)
            if job.is_done or (key is not None and self._is_about_to_be_known(job, key, match.length)):
                continue
            # One token more than the text, so that it does not give way again before it has made any progress. Known
            # blocks that nobody else holds could be evicted as well, and count as taken.
            lent = sum(self.store.index.is_held(node) for node in match.nodes[: match.length // self.store.block_size])
            new = [self.room.blocks(len(job.text) + 1) - lent] * len(self.store.allocators)
            if not self.room.has(total([*promised, new], len(new))):
                return
            num_taken += 1
            if self.returns is not None and key is not None and not self.returns.is_known(job, key, match.length):
                promised.append(new)
                continue
            if self.returns is not None and self.returns.begin(job, key):
                job.key = key
                promised.append(self._rest_of_arriving(job))
            else:
                self._open(job, key)
                promised.append(self._rest(job))
            self.waiting.remove(job)

    def _open(self, job: Job, key: Key | None) -> None:
        """Let a job be filled, from behind what is known of its text."""
        job.key = key
        job.cache = open_row(self.store, job.text, key)
        job.read_from = job.num_held
        job.request.cached_tokens = max(job.request.cached_tokens, job.num_held)
        bisect.insort(self.filling, job, key=_rank)

    def forget_keys(self) -> None:
        """Look at the model again before texts are next found or filed: it may have changed since."""
        self._keys.clear()

    def _key_of(self, job: Job) -> Key | None:
        if self.shares and job.namespace not in self._keys:
            self._keys[job.namespace] = self.store.key_of(job.namespace)
        return self._keys.get(job.namespace)

    def _rest(self, job: Job) -> Blocks:
        """Blocks that a filling job takes until it has decoded one token."""
        assert job.cache is not None
        return self.room.needed(job.cache, job.num_missing + 1)

    def _rest_of_arriving(self, job: Job) -> Blocks:
        """Blocks that a job takes beyond those that come back for it, until it has decoded one token."""
        assert self.returns is not None
        return [self.room.blocks(len(job.text) + 1) - self.returns.num_held(job)] * len(self.store.allocators)

    def _is_about_to_be_known(self, job: Job, key: object, known: int) -> bool:
        """Tell whether a prompt that is filled, or comes back, gives a job more whole blocks than are known now."""
        size = self.store.block_size
        text = job.text[:-1]
        return any(
            _begins_alike(text, other.text, known // size * size + size)
            for other in (*self.filling, *self.arriving)
            if other.key == key
        )

    def _portions(self, num_drafted: int) -> list[Portion]:
        """Choose what of the filling prompts the next step reads: the oldest first, as far as tokens and blocks go."""
        left, portions = self.prefill_chunk, []  # type: int, list[Portion]
        for job in self.filling:
            portion = Portion(job, min(left, job.num_missing))
            if portion.num_tokens and self.room.has(self._needed(num_drafted, [*portions, portion])):
                portions.append(portion)
                left -= portion.num_tokens
        return portions


def _longest(drafts: list[list[int]]) -> int:
    return max(map(len, drafts), default=0)


def _rank(job: Job) -> tuple[float, int]:
    return job.rank


def _begins_alike(a: list[int], b: list[int], length: int) -> bool:
    """Tell whether two texts have their first `length` tokens in common."""
    return min(len(a), len(b)) >= length and a[:length] == b[:length]
